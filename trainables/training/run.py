"""A worker's part of a trial: what it starts from, and what a step needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainables.config import TrialConfig
from trainables.errors import InputError
from trainables.execution.checkpoints import other_origin, read_sealed
from trainables.prepare import Prepared
from trainables.training.batches import epoch_shape
from trainables.training.clock import Clock
from trainables.training.effect import trained_weights
from trainables.training.objective import Trainee
from trainables.training.optimiser import make_optimiser
from trainables.training.original import Original
from trainables.training.sharding import distribute


@dataclass
class Run:
    """A worker's part of a trial under way.

    Attributes:
        config: the trial.
        prepared: what it starts from.
        device: of this worker.
        clock: of this attempt.
        trainee: what is trained.
        module: what a step calls in its place.
        optimiser: with all parameters that are trained.
        original: the frozen original's embeddings, where anything looks at them.
        begun_with: weights before training, on rank 0.
        state: of the checkpoint that this goes on from, see `state_before`.
        per_epoch: steps of an epoch.
        steps: of all epochs.
        beat: called now and then: the work is alive.
        waiting: logged since it was last looked at: step, seconds since 1970, and on the device, loss and temperature.
        history: the same as numbers, since the last evaluation.
        reports: of evaluations, which nobody may have seen yet.
    """

    config: TrialConfig
    prepared: Prepared
    device: torch.device
    clock: Clock
    trainee: Trainee
    module: nn.Module
    optimiser: torch.optim.Optimizer
    original: Original | None
    begun_with: dict[str, Tensor]
    state: dict[str, Any]
    per_epoch: int
    steps: int
    beat: Callable[[], object]
    waiting: list[tuple[int, float, Tensor]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device_seconds(self) -> float:
        """Held until now, by all workers and attempts."""
        return device_seconds(self.config, self.clock, self.state)


def rank() -> int:
    """Of this worker."""
    return dist.get_rank() if dist.is_initialized() else 0


def device_seconds(config: TrialConfig, clock: Clock, state: dict[str, Any]) -> float:
    """Held until now; of earlier attempts, what the clock knows, or else up to the checkpoint."""
    before = state["device_seconds"] if clock.held_before is None else 0.0
    world = dist.get_world_size() if dist.is_initialized() else 1
    return float(before + world * config.workers.share * clock.held)


def state_before(
    config: TrialConfig, prepared: Prepared, checkpoint: Path | None, passed_over: Sequence[str], logged: int
) -> dict[str, Any]:
    """Where training stands before this attempt; plain data, part of every checkpoint.

    Args:
        config: the trial.
        prepared: what it starts from.
        checkpoint: of an earlier attempt.
        passed_over: see `finetune`.
        logged: see `finetune`.

    Raises:
        CheckpointError: the checkpoint is damaged.
        InputError: it is another trial's.
    """
    state: dict[str, Any] = {
        "step": 0,
        "measured": True,
        "device_seconds": 0.0,
        "peak_memory_gb": 0.0,
        "resumed_from_steps": [],
        "passed_over": [],
        "history": [],
        "reports": [],
    }
    if checkpoint is not None:
        state |= read_sealed(checkpoint)
        if other := other_origin(state, config, prepared.hashes):
            raise InputError(f"checkpoint {checkpoint} was made from something else: {'; '.join(other)}")
        state["resumed_from_steps"].append(state["step"])
    state["passed_over"].extend(passed_over)
    state["reports"] = [report for report in state["reports"] if report["step"] > logged]
    return state


def told(state: dict[str, Any], passed_over: Sequence[str]) -> dict[str, Any]:
    """What every report of this attempt says of what it went on from."""
    resumed = state["resumed_from_steps"]
    return {
        "resumed_from_step": float(resumed[-1]) if resumed else -1.0,
        "passed_over": json.dumps(list(passed_over)),
    }


def begin(
    config: TrialConfig,
    prepared: Prepared,
    device: torch.device,
    state: dict[str, Any],
    clock: Clock,
    beat: Callable[[], object],
) -> Run:
    """Model, optimiser and whatever else a step needs, as they are before the first."""
    training = config.training
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prepared.base.to(device)
    if training.gradient_checkpointing:
        prepared.base.checkpoint_layers()
    trainee = Trainee(prepared.base, config.point, training.micro_batch).to(device)
    trainee.freeze_idle(config.data.image_pixels)
    cropped = config.point.image_augmentation == "crop"
    begun_with = trained_weights(trainee) if rank() == 0 else {}
    original = Original(prepared, device, cropped=cropped) if trainee.needs_original else None
    _, per_epoch = epoch_shape(config, len(prepared.dataset.train.image_ids))
    module = distribute(trainee, device, config.workers.sharded)
    steps = training.epochs * per_epoch
    return Run(
        config,
        prepared,
        device,
        clock,
        trainee,
        module,
        make_optimiser(trainee, training, steps),
        original,
        begun_with,
        state,
        per_epoch,
        steps,
        beat,
        history=list(state["history"]),
        reports=list(state["reports"]),
    )
