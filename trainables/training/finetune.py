"""The per-worker loop: adversarial fine-tuning with checkpoints, small evaluations and the full one at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainables.config import Protocol, TrialConfig
from trainables.errors import InputError
from trainables.evaluation.audit import audit
from trainables.evaluation.retrieval import Ranks
from trainables.evaluation.robustness import Gallery, evaluate
from trainables.evaluation.scores import correct_bits, recall_metrics
from trainables.execution.checkpoints import RESULT, other_origin, read_sealed, seal
from trainables.identity import made_from, protocol_hash
from trainables.prepare import Prepared
from trainables.results import Metric, TrialResult, library_versions
from trainables.training.batches import epoch_shape, rate_factor
from trainables.training.clock import Clock, peak_memory_gb
from trainables.training.effect import trained_weights, untouched
from trainables.training.feed import Batch, Feed
from trainables.training.objective import Trainee
from trainables.training.optimiser import make_optimiser
from trainables.training.original import Original
from trainables.training.sharding import distribute, gather, merge, whole
from trainables.training.snapshot import Snapshot, restore
from trainables.training.step import worker_loss


class Diverged(Exception):
    """The loss is not a number any more: the point itself cannot work."""


Report = Callable[[dict[str, Any], Future[Path] | None], None]
"""Called after every epoch on every worker with plain metrics and, on rank 0, the checkpoint's folder to be."""


def finetune(
    config: TrialConfig,
    prepared: Prepared,
    device: torch.device,
    checkpoint: Path | None,
    scratch: Path,
    report: Report,
    passed_over: Sequence[str] = (),
    asked: Callable[[], bool] = lambda: False,
) -> None:
    """Train, evaluate and report; go on from `checkpoint` where there is one.

    Checkpoints are written by a thread, one at a time, while training goes on; all are there in the end. The last
    report's checkpoint folder holds `result.json`, a `TrialResult`, the trial as `trial.json`, and `model`, which is in
    its family's own layout. A checkpoint that is already complete is reported again and nothing is redone.

    Args:
        config: the trial.
        prepared: see `prepare`.
        device: of this worker.
        checkpoint: folder written by an earlier attempt.
        scratch: where checkpoint folders are written before they are reported.
        report: hands metrics and checkpoint on.
        passed_over: why newer checkpoints than this could not be used; it is reported, and kept with the result.
        asked: after every step, whether to report and to write a checkpoint now, in the middle of an epoch and without
            an evaluation; the same answer on all workers.

    Raises:
        Diverged: the loss became NaN or infinite.
        CheckpointError: the checkpoint is damaged.
        InputError: it is another trial's, or the point cannot be trained.
    """
    state = _state(config, prepared, checkpoint, passed_over)
    if checkpoint is not None and (checkpoint / RESULT).exists():
        message = {**state["report"], "device_seconds": state["device_seconds"]}
        report(message, _written(checkpoint) if _rank() == 0 else None)
        return
    run = _begin(config, prepared, device, state)
    if checkpoint is not None:
        restore(run.trainee, run.optimiser, checkpoint)
    batches = Feed(config, prepared, device).batches(state["step"], run.steps)
    writing: Future[Path] | None = None
    with ThreadPoolExecutor(1, "checkpoint") as thread:
        for step, batch in enumerate(batches, state["step"]):
            loss, done = _train(run, batch, step), step + 1
            epoch_ends = done % run.per_epoch == 0
            reporting = epoch_ends or asked()
            if reporting or done % config.training.log_every_steps == 0:
                _log(run, done, loss)
            if not reporting:
                continue
            entries = _entries(run)
            measured = _evaluate(run, done) if epoch_ends else None
            message = _message(run, done, entries, measured, passed_over)
            if writing is not None:
                writing.result()  # one at a time; why it could not be written ends the trial
            write = _contents(run, message, measured)
            if _rank() == 0:
                writing = thread.submit(_write, scratch / f"step-{done}", write, _position(run, message))
            report(message, writing)
        if writing is not None:
            writing.result()


@dataclass
class Run:
    """A worker's part of a trial under way.

    Attributes:
        config: the trial.
        prepared: what it starts from.
        device: of this worker.
        clock: since `began`, seconds since 1970.
        trainee: what is trained.
        module: what a step calls in its place.
        optimiser: with all parameters that are trained.
        original: the frozen original's embeddings, where anything looks at them.
        begun_with: weights before training, on rank 0.
        state: of the checkpoint that this goes on from, see `_state`.
        per_epoch: steps of an epoch.
        steps: of all epochs.
        history: logged since the last report: step, seconds since 1970, and on the device, loss and temperature.
    """

    config: TrialConfig
    prepared: Prepared
    device: torch.device
    clock: Clock
    began: float
    trainee: Trainee
    module: nn.Module
    optimiser: torch.optim.Optimizer
    original: Original | None
    begun_with: dict[str, Tensor]
    state: dict[str, Any]
    per_epoch: int
    steps: int
    history: list[tuple[int, float, Tensor]] = field(default_factory=list)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _state(
    config: TrialConfig, prepared: Prepared, checkpoint: Path | None, passed_over: Sequence[str]
) -> dict[str, Any]:
    """Where training stands before this attempt; plain data, part of every checkpoint."""
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
        state["resumed_from_steps"].append(state["step"])
    state["passed_over"].extend(passed_over)
    return state


def _begin(config: TrialConfig, prepared: Prepared, device: torch.device, state: dict[str, Any]) -> Run:
    """Model, optimiser and whatever else a step needs, as they are before the first."""
    began, clock, training = time.time(), Clock(device), config.training
    clock.mark("load")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prepared.base.to(device)
    if training.gradient_checkpointing:
        prepared.base.checkpoint_layers()
    trainee = Trainee(prepared.base, config.point, training.micro_batch).to(device)
    trainee.freeze_idle(config.data.image_pixels)
    begun_with = trained_weights(trainee) if _rank() == 0 else {}
    original = (
        Original(prepared, device, cropped=config.point.image_augmentation == "crop")
        if trainee.needs_original
        else None
    )
    _, per_epoch = epoch_shape(config, len(prepared.dataset.train.image_ids))
    module = distribute(trainee, device, config.workers.sharded)
    steps = training.epochs * per_epoch
    optimiser = make_optimiser(trainee, training, steps)
    return Run(
        config,
        prepared,
        device,
        clock,
        began,
        trainee,
        module,
        optimiser,
        original,
        begun_with,
        state,
        per_epoch,
        steps,
    )


def _train(run: Run, batch: Batch, step: int) -> Tensor:
    """One step and its loss. Nothing in it waits for the device."""
    training, trainee, optimiser = run.config.training, run.trainee, run.optimiser
    optimiser.zero_grad(set_to_none=True)  # before the attack, which needs the memory
    loss = worker_loss(run.module, trainee, run.config, run.original, batch, step, run.steps, run.clock)
    loss.backward()
    trained = [weight for weight in trainee.model.parameters() if weight.requires_grad]
    nn.utils.clip_grad_norm_(trained, training.gradient_clip)
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * rate_factor(step, run.steps, training.warmup_fraction)
    optimiser.step()
    trainee.clamp_temperature()
    trainee.update_teacher()
    return loss.detach()


def _log(run: Run, step: int, loss: Tensor) -> None:
    """Keep loss and temperature after `step` steps, without waiting for them."""
    temperature = whole(run.trainee.log_temperature.detach()).exp()
    run.history.append((step, time.time(), torch.cat([loss.view(1), temperature])))


def _entries(run: Run) -> list[dict[str, float]]:
    """What was logged since the last report, as numbers: the one place where training waits for the device.

    Raises:
        Diverged: a loss among it is not finite.
    """
    run.clock.settle()
    steps, times, logged = zip(*run.history, strict=True)
    entries = [
        {"step": float(step), "time": moment, "loss": loss, "temperature": temperature}
        for step, moment, (loss, temperature) in zip(steps, times, torch.stack(logged).tolist(), strict=True)
    ]
    run.history.clear()
    if not all(math.isfinite(entry["loss"]) for entry in entries):
        raise Diverged(f"the loss became {entries[-1]['loss']} by step {entries[-1]['step']:.0f}")
    return entries


class Measured(NamedTuple):
    """An evaluation: how, on what, and what came out."""

    protocol: Protocol
    gallery: Gallery
    ranks: dict[str, Ranks]
    metrics: dict[str, Metric]


def _evaluate(run: Run, step: int) -> Measured:
    """The full evaluation after the last step, a smaller one before."""
    config, gallery, protocol = run.config, run.prepared.gallery, run.config.protocol
    run.clock.mark("evaluate")
    if step == run.steps:
        merge(run.trainee)
    else:
        gather(run.trainee)
        protocol = protocol.rung(step / run.steps, len(gallery.pixels))
        gallery = gallery.first(protocol.gallery_images)
    model, tokens = run.trainee.model, config.model.max_tokens
    ranks = evaluate(model, gallery, protocol, max_tokens=tokens, device=run.device).ranks
    metrics = recall_metrics(ranks, protocol)
    run.clock.settle()
    run.clock.mark("train")
    return Measured(protocol, gallery, ranks, metrics)


def _message(
    run: Run, step: int, entries: list[dict[str, float]], measured: Measured | None, passed_over: Sequence[str]
) -> dict[str, Any]:
    """What is reported after `step`: plain numbers and JSON."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    resumed = run.state["resumed_from_steps"]
    return {
        "step": step,
        "epoch": step // run.per_epoch,
        "last": step == run.steps,
        "device_seconds": run.state["device_seconds"] + world * run.config.workers.share * (time.time() - run.began),
        "peak_memory_gb": max(run.state["peak_memory_gb"], peak_memory_gb(run.device)),
        "resumed_from_step": float(resumed[-1]) if resumed else -1.0,
        "passed_over": json.dumps(list(passed_over)),
        "history": json.dumps(entries),
        **({name: metric.value for name, metric in measured.metrics.items()} if measured else {}),
    }


def _position(run: Run, message: dict[str, Any]) -> dict[str, Any]:
    """The state of the checkpoint that is reported with the message."""
    position = {name: message[name] for name in ("step", "device_seconds", "peak_memory_gb")}
    return {**run.state, **position, "report": message, "made_from": made_from(run.config, run.prepared.hashes)}


def _contents(run: Run, message: dict[str, Any], measured: Measured | None) -> Callable[[Path], None]:
    """What writes a checkpoint's files, from any thread and whatever the next steps do."""
    if not message["last"]:
        return Snapshot.take(run.trainee, run.optimiser).write
    if _rank() > 0:
        return lambda folder: None
    assert measured is not None
    return partial(_write_result, run, _result(run, message, measured))


def _write(folder: Path, contents: Callable[[Path], None], state: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    contents(folder)
    seal(folder, state)
    return folder


def _written(folder: Path) -> Future[Path]:
    found: Future[Path] = Future()
    found.set_result(folder)
    return found


def _result(run: Run, message: dict[str, Any], measured: Measured) -> TrialResult:
    """What the trial measured in the end."""
    protocol, gallery, ranks, metrics = measured
    temperature = json.loads(message["history"])[-1]["temperature"]
    model, tokens = run.trainee.model, run.config.model.max_tokens
    audited = None
    if protocol.audit:
        audited = audit(model, gallery, protocol, temperature=temperature, max_tokens=tokens, device=run.device)
    return TrialResult(
        metrics=metrics,
        correct=correct_bits(ranks, protocol),
        queries={"tr": len(ranks["clean"].tr), "ir": len(ranks["clean"].ir)},
        captions_per_image=np.bincount(gallery.caption_image).tolist(),
        untouched=untouched(run.trainee, run.begun_with, run.steps),
        device_seconds=message["device_seconds"],
        peak_memory_gb=message["peak_memory_gb"],
        seconds={name: round(value, 3) for name, value in run.clock.seconds.items() if name},
        steps=run.steps,
        resumed_from_steps=run.state["resumed_from_steps"],
        passed_over=run.state["passed_over"],
        temperature=temperature,
        audit=audited,
        hashes={**run.prepared.hashes, "protocol": protocol_hash(run.config.protocol)},
        versions=library_versions(),
    )


def _write_result(run: Run, result: TrialResult, folder: Path) -> None:
    config, model = run.config, run.trainee.model
    (folder / RESULT).write_text(result.model_dump_json(), encoding="utf-8")
    (folder / "trial.json").write_text(config.model_dump_json(), encoding="utf-8")
    if config.point.contrastive_weight > 0:  # no other loss has one
        model.own_temperature = result.temperature
    model.resize = config.data.resize
    model.save(folder / "model")
