"""What each Ray Train worker runs: set-up, the per-worker loop under its watchdog, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trainables.config import Model, TrialConfig, WorkersConfig
from trainables.execution.uploads import TRACE, Uploads
from trainables.files import opened

if TYPE_CHECKING:
    import torch

WENT_ON_FROM = "paretovl_checkpoint"
"""Attribute of what a worker raises: the name of the checkpoint that it went on from, or None."""


class Patience(Model):
    """How often and how long a trial is tried."""

    retries: int = Field(0, ge=0, description="how often a lost or stuck worker or node is made up for")
    silent_seconds: float = Field(1800, gt=0, description="a worker that reports nothing for so long is stuck")
    trial_seconds: float | None = Field(None, gt=0, description="longest a trial may hold its devices, all attempts")


class TooLong(Exception):
    """The trial held its devices longer than a trial may: the point itself is too dear."""


def worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    from ray.train.torch import get_device

    from trainables.prepare import prepare
    from trainables.training.finetune import finetune
    from trainables.training.watchdog import Watchdog

    trial, patience = TrialConfig.model_validate(config["trial"]), Patience.model_validate(config["patience"])
    workers, device = trial.workers, get_device()
    set_up(workers, device)

    def report(metrics: dict[str, Any], written: Future[Path] | None) -> None:
        uploads.report(metrics, written)
        watchdog.beat()
        held = metrics["device_seconds"] / (workers.count * workers.share)
        if patience.trial_seconds is not None and held > patience.trial_seconds and not metrics["last"]:
            raise TooLong(f"{held:.0f} s by step {metrics['step']}, more than {patience.trial_seconds:.0f} s")

    # Ray's is of this attempt, from before it replaced lost workers.
    path, checkpoint = config["checkpoint"], ray.train.get_checkpoint()
    if checkpoint is None and path is not None:
        files, folder_there = opened(path)
        checkpoint = ray.train.Checkpoint(folder_there, files)
    watchdog = Watchdog(patience.silent_seconds, lambda code: _exit_stuck(trial, code))
    try:
        with watchdog, tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            scratch, begun = Path(folder), None
            uploads = stack.enter_context(Uploads(scratch))
            if checkpoint is not None:
                begun = Path(stack.enter_context(checkpoint.as_directory()))
            finetune(trial, prepare(trial), device, begun, scratch, report, config["passed_over"])
    except Exception as error:
        setattr(error, TRACE, traceback.format_exc())
        setattr(error, WENT_ON_FROM, checkpoint and Path(checkpoint.path).name)
        raise


def set_up(workers: WorkersConfig, device: torch.device) -> None:
    """Have this process compute as a worker, on no more of the machine than is its: threads, or memory of a GPU."""
    import torch

    if device.type == "cpu":
        torch.set_num_threads(max(1, int(workers.cpus_per_worker)))
        return
    torch.set_float32_matmul_precision("high")  # TF32 in what no autocast reaches, but see `full_precision`
    if workers.share < 1:
        torch.cuda.set_per_process_memory_fraction(workers.share, device)


def _exit_stuck(trial: TrialConfig, code: int) -> None:
    """End this process, with a marker that says why: Ray only sees that it is gone."""
    try:
        write_marker(trial, "stuck", "")
    finally:
        os._exit(code)


def write_marker(trial: TrialConfig, name: str, text: str) -> None:
    """For whoever runs the trial next, beside its checkpoints."""
    storage, folder = opened(trial.storage_path)
    with storage.open_output_stream(f"{folder}/{trial.key}/{name}") as word:
        word.write(text.encode())


def take_marker(trial: TrialConfig, name: str) -> str | None:
    """What was left under the name, once; None if nothing was."""
    storage, folder = opened(trial.storage_path)
    path = f"{folder}/{trial.key}/{name}"
    if not storage.get_file_info(path).is_file:
        return None
    with storage.open_input_stream(path) as word:
        text = bytes(word.read()).decode()
    storage.delete_file(path)
    return text
