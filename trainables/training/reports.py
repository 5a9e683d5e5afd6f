"""What a worker reports and leaves behind: messages, checkpoints, and in the end what the trial measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainables.config import Protocol
from trainables.evaluation.audit import audit
from trainables.evaluation.robustness import Evaluation, Gallery
from trainables.evaluation.scores import correct_bits
from trainables.execution.checkpoints import RESULT, seal
from trainables.identity import made_from, protocol_hash
from trainables.results import Metric, TrialResult, library_versions
from trainables.training.clock import peak_memory_gb
from trainables.training.effect import untouched
from trainables.training.run import Run, rank
from trainables.training.sharding import whole
from trainables.training.snapshot import Snapshot

Report = Callable[[dict[str, Any], Future[Path] | None], None]
"""Called on every worker with plain metrics and, on rank 0, the checkpoint's folder to be, if there is one."""


class Measured(NamedTuple):
    """An evaluation: how, on what, and what came out."""

    protocol: Protocol
    gallery: Gallery
    found: Evaluation
    metrics: dict[str, Metric]


def message_of(run: Run, step: int, measured: Measured | None, told: dict[str, Any]) -> dict[str, Any]:
    """What is reported after `step`: plain numbers and JSON; with an evaluation, what was measured and the history."""
    return {
        "step": step,
        "epoch": step // run.per_epoch,
        "last": measured is not None and step == run.steps,
        "device_seconds": run.device_seconds,
        "peak_memory_gb": max(run.state["peak_memory_gb"], peak_memory_gb(run.device)),
        **told,
        **({} if measured is None else {"history": json.dumps(run.history), "hashes": json.dumps(run.prepared.hashes)}),
        **({} if measured is None else {name: metric.value for name, metric in measured.metrics.items()}),
    }


def state_of(run: Run, message: dict[str, Any], measured: Measured | None) -> dict[str, Any]:
    """The state of the checkpoint that is reported with the message."""
    return {
        **run.state,
        **{name: message[name] for name in ("step", "device_seconds", "peak_memory_gb")},
        "measured": measured is not None,
        "history": list(run.history),
        "reports": list(run.reports),
        "report": message,
        "made_from": made_from(run.config, run.prepared.hashes),
    }


def contents_of(run: Run, message: dict[str, Any], measured: Measured | None) -> Callable[[Path], None]:
    """What writes a checkpoint's files, from any thread and whatever the next steps do."""
    if measured is None or not message["last"]:
        return Snapshot.take(run.trainee, run.optimiser).write
    if rank() > 0:
        return lambda folder: None
    return partial(_write_result, run, _result(run, message, measured))


def write(folder: Path, contents: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """A checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    contents(folder)
    seal(folder, state)
    return folder


def written(folder: Path) -> Future[Path]:
    """One that is there."""
    found: Future[Path] = Future()
    found.set_result(folder)
    return found


def _result(run: Run, message: dict[str, Any], measured: Measured) -> TrialResult:
    """What the trial measured in the end."""
    protocol, gallery, found, metrics = measured
    temperature = whole(run.trainee.log_temperature.detach()).exp().item()
    model, tokens, audited = run.trainee.model, run.config.model.max_tokens, None
    if protocol.audit:
        run.clock.mark("audit")
        audited = audit(
            model, gallery, protocol, temperature=temperature, max_tokens=tokens, device=run.device, beat=run.beat
        )
        run.clock.mark("save")
    run.clock.settle()
    return TrialResult(
        metrics=metrics,
        split=run.config.data.eval_split,
        correct=correct_bits(found.ranks, protocol),
        queries={"tr": len(found.ranks["clean"].tr), "ir": len(found.ranks["clean"].ir)},
        captions_per_image=np.bincount(gallery.caption_image).tolist(),
        untouched=untouched(run.trainee, run.begun_with, run.steps),
        device_seconds=run.device_seconds,
        peak_memory_gb=message["peak_memory_gb"],
        seconds=dict(run.clock.seconds),
        moved_bytes=dict(run.clock.moved),
        steps=run.steps,
        evaluation_images=found.images_at_once or None,
        resumed_from_steps=run.state["resumed_from_steps"],
        passed_over=run.state["passed_over"],
        temperature=temperature,
        audit=audited,
        hashes={**run.prepared.hashes, "protocol": protocol_hash(run.config.protocol)},
        versions=library_versions(),
    )


def _write_result(run: Run, result: TrialResult, folder: Path) -> None:
    """The model first, so that its seconds are told, too."""
    config, model, start = run.config, run.trainee.model, time.perf_counter()
    (folder / "trial.json").write_text(config.model_dump_json(), encoding="utf-8")
    if config.point.contrastive_weight > 0:  # no other loss has one
        model.own_temperature = result.temperature
    model.resize = config.data.resize
    model.save(folder / "model")
    saving = result.seconds["save"] + time.perf_counter() - start
    seconds = {name: round(value, 3) for name, value in {**result.seconds, "save": saving}.items()}
    result = result.model_copy(update={"seconds": seconds, "device_seconds": run.device_seconds})
    (folder / RESULT).write_text(result.model_dump_json(), encoding="utf-8")
