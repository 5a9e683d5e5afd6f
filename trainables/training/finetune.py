"""The per-worker loop: adversarial fine-tuning with checkpoints, small evaluations and the full one at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainables.config import TrialConfig
from trainables.errors import InputError
from trainables.evaluation.audit import audit
from trainables.evaluation.robustness import evaluate
from trainables.evaluation.scores import correct_bits, recall_metrics
from trainables.execution.checkpoints import RESULT, other_origin, read_sealed, seal
from trainables.identity import made_from, protocol_hash
from trainables.prepare import Prepared
from trainables.results import TrialResult, library_versions
from trainables.training.batches import epoch_shape, rate_factor
from trainables.training.clock import Clock, peak_memory_gb
from trainables.training.effect import trained_weights, untouched
from trainables.training.objective import Trainee
from trainables.training.optimiser import make_optimiser
from trainables.training.sharding import distribute, full_state, gather, load_full_state, merge, whole
from trainables.training.step import original_embeddings, worker_loss


class Diverged(Exception):
    """The loss is not a number any more: the point itself cannot work."""


WEIGHTS, OPTIMISER = "model.safetensors", "optimiser.pt"
"""Of a checkpoint in the middle of training."""

Report = Callable[[dict[str, Any], Path | None], None]
"""Called after every epoch on every worker with plain metrics and, on rank 0, the checkpoint folder."""


def finetune(
    config: TrialConfig,
    prepared: Prepared,
    device: torch.device,
    checkpoint: Path | None,
    scratch: Path,
    report: Report,
    passed_over: Sequence[str] = (),
) -> None:
    """Train, evaluate and report; go on from `checkpoint` where there is one.

    The last report's checkpoint folder holds `result.json`, a `TrialResult`, the trial as `trial.json`, and `model`,
    which is in its family's own layout. A checkpoint that is already complete is reported again and nothing is redone.

    Args:
        config: the trial.
        prepared: see `prepare`.
        device: of this worker.
        checkpoint: folder written by an earlier attempt.
        scratch: where checkpoint folders are written before they are reported.
        report: hands metrics and checkpoint on.
        passed_over: why newer checkpoints than this could not be used; it is reported, and kept with the result.

    Raises:
        Diverged: the loss became NaN or infinite.
        CheckpointError: the checkpoint is damaged.
        InputError: it is another trial's, or the point cannot be trained.
    """
    started = time.time()
    clock = Clock(device)
    clock.mark("load")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = config.training
    leader = not dist.is_initialized() or dist.get_rank() == 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    prepared.base.to(device)
    if training.gradient_checkpointing:
        prepared.base.checkpoint_layers()
    trainee = Trainee(prepared.base, config.point).to(device)
    begun_with = trained_weights(trainee) if leader else {}
    originals = original_embeddings(prepared, device) if trainee.needs_original else None
    _, per_epoch = epoch_shape(config, len(prepared.dataset.train.image_ids))
    steps = training.epochs * per_epoch
    ddp = distribute(trainee, device, config.workers.sharded)
    trained = [weight for weight in trainee.model.parameters() if weight.requires_grad]
    optimiser = make_optimiser(trainee, training, steps)
    state: dict[str, Any] = {
        "step": 0,
        "device_seconds": 0.0,
        "peak_memory_gb": 0.0,
        "resumed_from_steps": [],
        "passed_over": [],
    }
    if checkpoint is not None:
        state |= read_sealed(checkpoint)
        if other := other_origin(state, config, prepared.hashes):
            raise InputError(f"checkpoint {checkpoint} was made from something else: {'; '.join(other)}")
        if (checkpoint / RESULT).exists():
            report({**state["report"], "device_seconds": state["device_seconds"]}, checkpoint if leader else None)
            return
        optimiser_state = torch.load(checkpoint / OPTIMISER, map_location="cpu", weights_only=True)
        load_full_state(trainee, optimiser, load_file(checkpoint / WEIGHTS), optimiser_state)
        state["resumed_from_steps"].append(state["step"])
    state["passed_over"].extend(passed_over)
    history: list[dict[str, Tensor | float]] = []

    for step in range(state["step"], steps):
        loss = worker_loss(ddp, trainee, config, prepared, originals, step, steps, clock, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, training.gradient_clip)
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor(step, steps, training.warmup_fraction)
        optimiser.step()
        trainee.clamp_temperature()
        trainee.update_teacher()
        if (step + 1) % training.log_every_steps == 0 or (step + 1) % per_epoch == 0:
            temperature = whole(trainee.log_temperature.detach()).exp()
            history.append({"step": step + 1, "time": time.time(), "loss": loss.detach(), "temperature": temperature})
        if (step + 1) % per_epoch:
            continue

        clock.settle()
        entries = [{name: float(value) for name, value in entry.items()} for entry in history]
        history.clear()
        if not all(math.isfinite(entry["loss"]) for entry in entries):
            raise Diverged(f"the loss became {entries[-1]['loss']} by step {step + 1}")
        clock.mark("evaluate")
        last = step + 1 == steps
        (merge if last else gather)(trainee)
        images = len(prepared.gallery.pixels)
        protocol = config.protocol if last else config.protocol.rung((step + 1) / steps, images)
        gallery = prepared.gallery if last else prepared.gallery.first(protocol.gallery_images)
        ranks = evaluate(
            trainee.model,
            gallery,
            protocol,
            max_tokens=config.model.max_tokens,
            device=device,
        ).ranks
        metrics = recall_metrics(ranks, protocol)
        clock.settle()
        clock.mark("train")
        device_seconds = state["device_seconds"] + world * (time.time() - started)
        peak = max(state["peak_memory_gb"], peak_memory_gb(device))
        message = {
            "step": step + 1,
            "epoch": (step + 1) // per_epoch,
            "last": last,
            "device_seconds": device_seconds,
            "peak_memory_gb": peak,
            "resumed_from_step": float(state["resumed_from_steps"][-1]) if state["resumed_from_steps"] else -1.0,
            "passed_over": json.dumps(list(passed_over)),
            "history": json.dumps(entries),
            **{name: metric.value for name, metric in metrics.items()},
        }
        folder = None
        weights, optimiser_state = ({}, {}) if last else full_state(trainee, optimiser)
        if leader:
            result = None
            if last:
                result = TrialResult(
                    metrics=metrics,
                    correct=correct_bits(ranks, protocol),
                    queries={"tr": len(ranks["clean"].tr), "ir": len(ranks["clean"].ir)},
                    captions_per_image=np.bincount(gallery.caption_image).tolist(),
                    untouched=untouched(trainee, begun_with, steps),
                    device_seconds=device_seconds,
                    peak_memory_gb=peak,
                    seconds={name: round(value, 3) for name, value in clock.seconds.items() if name},
                    steps=steps,
                    resumed_from_steps=state["resumed_from_steps"],
                    passed_over=state["passed_over"],
                    temperature=entries[-1]["temperature"],
                    audit=audit(
                        trainee.model,
                        gallery,
                        protocol,
                        temperature=entries[-1]["temperature"],
                        max_tokens=config.model.max_tokens,
                        device=device,
                    )
                    if protocol.audit
                    else None,
                    hashes={**prepared.hashes, "protocol": protocol_hash(config.protocol)},
                    versions=library_versions(),
                )
            folder = scratch / f"step-{step + 1}"
            folder.mkdir(parents=True, exist_ok=True)
            position = {"step": step + 1, "device_seconds": device_seconds, "peak_memory_gb": peak}
            if result is None:
                # Learning rate and random numbers are functions of the step and need no state.
                save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
                torch.save(optimiser_state, folder / OPTIMISER)
            else:
                (folder / RESULT).write_text(result.model_dump_json(), encoding="utf-8")
                (folder / "trial.json").write_text(config.model_dump_json(), encoding="utf-8")
                if config.point.contrastive_weight > 0:  # no other loss has one
                    trainee.model.own_temperature = entries[-1]["temperature"]
                trainee.model.resize = config.data.resize
                trainee.model.save(folder / "model")
            origin = made_from(config, prepared.hashes)
            seal(folder, {**state, **position, "report": message, "made_from": origin})
        report(message, folder)
