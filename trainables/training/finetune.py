"""The per-worker loop: adversarial fine-tuning with checkpoints, small evaluations and the full one at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from trainables.config import TrialConfig, content_hash
from trainables.evaluation.adversarial import model_digest
from trainables.evaluation.robustness import evaluate
from trainables.evaluation.scores import recall_metrics
from trainables.execution.checkpoints import RESULT
from trainables.execution.shelf import Shelf
from trainables.identity import made_from
from trainables.prepare import Prepared
from trainables.training.batches import rate_factor
from trainables.training.clock import Clock
from trainables.training.feed import Batch, Feed
from trainables.training.reports import Measured, Report, contents_of, message_of, state_of, write, written
from trainables.training.run import Run, begin, device_seconds, rank, state_before, told
from trainables.training.sharding import gather, merge, whole
from trainables.training.snapshot import restore
from trainables.training.step import worker_loss


class Diverged(Exception):
    """The loss is not a number any more: the point itself cannot work."""


def finetune(
    config: TrialConfig,
    prepared: Prepared,
    device: torch.device,
    checkpoint: Path | None,
    scratch: Path,
    report: Report,
    passed_over: Sequence[str] = (),
    asked: Callable[[], bool] = lambda: False,
    *,
    beat: Callable[[], object] = lambda: None,
    clock: Clock | None = None,
    shelf: Shelf | None = None,
    logged: int = -1,
) -> None:
    """Train, evaluate and report; go on from `checkpoint` where there is one.

    Every epoch ends in an evaluation, a report of it and a checkpoint. There is one before the full evaluation, too,
    and whenever it is asked for: those are reported without an evaluation, as `last: False` and without `history`.
    Checkpoints are written by a thread, one at a time, while training goes on; all are there in the end. The last
    report's checkpoint folder holds `result.json`, a `TrialResult`, the trial as `trial.json`, and `model`, which is in
    its family's own layout. A checkpoint that is already complete is reported again and nothing is redone.

    What was measured up to the checkpoint is reported again, too, without a checkpoint: whoever got those reports may
    have been gone before they were written down.

    Args:
        config: the trial.
        prepared: see `prepare`.
        device: of this worker.
        checkpoint: folder written by an earlier attempt.
        scratch: where checkpoint folders are written before they are reported.
        report: hands metrics and checkpoint on.
        passed_over: why newer checkpoints than this could not be used; it is reported, and kept with the result.
        asked: after every step, whether to write a checkpoint now, in the middle of an epoch and without an
            evaluation; the same answer on all workers. No result depends on it.
        beat: called after every part of an evaluation.
        clock: of this attempt, which began before; a new one if not given.
        shelf: keeps what is done of the full evaluation.
        logged: what was measured up to this step is known, and not reported again.

    Raises:
        Diverged: the loss became NaN or infinite.
        CheckpointError: the checkpoint is damaged.
        InputError: it is another trial's, or the point cannot be trained.
    """
    clock = clock or Clock(device)
    state = state_before(config, prepared, checkpoint, passed_over, logged)
    origin = told(state, passed_over)
    complete = checkpoint is not None and (checkpoint / RESULT).exists()
    for earlier in state["reports"]:
        if not earlier["last"]:
            report({**earlier, **origin}, None)
    if complete:
        assert checkpoint is not None
        message = {**state["report"], **origin, "device_seconds": device_seconds(config, clock, state)}
        report(message, written(checkpoint) if rank() == 0 else None)
        return
    run = begin(config, prepared, device, state, clock, beat)
    if checkpoint is not None:
        restore(run.trainee, run.optimiser, checkpoint)
    first, writing = state["step"], None
    with ThreadPoolExecutor(1, "checkpoint") as thread:

        def hand_on(step: int, measured: Measured | None) -> None:
            nonlocal writing
            clock.mark("save")
            message = message_of(run, step, measured, origin)
            if measured is not None:
                run.history.clear()
                run.reports.append(message)
            if writing is not None:
                writing.result()  # one at a time; why it could not be written ends the trial
            contents = contents_of(run, message, measured)
            if rank() == 0:
                place = scratch / f"step-{step}{'' if measured else UNMEASURED}"
                writing = thread.submit(write, place, contents, state_of(run, message, measured))
            report(message, writing)
            clock.mark("train")

        if not state["measured"] and first % run.per_epoch == 0:
            hand_on(first, _evaluate(run, first, shelf))
        for step, batch in enumerate(Feed(config, prepared, device).batches(first, run.steps), first):
            loss, done = _train(run, batch, step), step + 1
            wanted, epoch_ends = asked(), done % run.per_epoch == 0
            if epoch_ends or done % config.training.log_every_steps == 0:
                _log(run, done, loss)
            if wanted or epoch_ends:
                _settle(run)
            if wanted or done == run.steps:
                hand_on(done, None)
            if epoch_ends:
                hand_on(done, _evaluate(run, done, shelf))
        if writing is not None:
            writing.result()


UNMEASURED = "-unmeasured"
"""A checkpoint's folder ends with it if there is no evaluation of it yet."""


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
    run.waiting.append((step, time.time(), torch.cat([loss.view(1), temperature])))


def _settle(run: Run) -> None:
    """Add what was logged to the history, as numbers: the one place where training waits for the device.

    Raises:
        Diverged: a loss among it is not finite.
    """
    run.clock.settle()
    numbers = torch.stack([logged for _, _, logged in run.waiting]).tolist() if run.waiting else []
    entries = [
        {"step": float(step), "time": moment, "loss": loss, "temperature": temperature}
        for (step, moment, _), (loss, temperature) in zip(run.waiting, numbers, strict=True)
    ]
    run.waiting.clear()
    run.history.extend(entries)
    if not all(math.isfinite(entry["loss"]) for entry in entries):
        raise Diverged(f"the loss became {entries[-1]['loss']} by step {entries[-1]['step']:.0f}")


def _evaluate(run: Run, step: int, shelf: Shelf | None) -> Measured:
    """The full evaluation after the last step, a smaller one before."""
    config, gallery, protocol, kept = run.config, run.prepared.gallery, run.config.protocol, None
    run.clock.mark("evaluate")
    model, tokens = run.trainee.model, config.model.max_tokens
    if step == run.steps:
        merge(run.trainee)
        if shelf is not None:
            kept = shelf.of(content_hash({**made_from(config, run.prepared.hashes), "weights": model_digest(model)}))
    else:
        gather(run.trainee)
        protocol = protocol.rung(step / run.steps, len(gallery.pixels))
        gallery = gallery.first(protocol.gallery_images)
    found = evaluate(model, gallery, protocol, max_tokens=tokens, device=run.device, beat=run.beat, kept=kept)
    metrics = recall_metrics(found.ranks, protocol)
    run.clock.settle()
    return Measured(protocol, gallery, found, metrics)
