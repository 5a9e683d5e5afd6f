"""What each Ray Train worker runs: set-up, the per-worker loop under its watchdog, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trainables.config import Model, TrialConfig, WorkersConfig
from trainables.execution.shelf import Shelf
from trainables.execution.uploads import TRACE, Uploads
from trainables.files import opened

if TYPE_CHECKING:
    import torch

WENT_ON_FROM = "paretovl_checkpoint"
"""Attribute of what a worker raises: the name of the checkpoint that it went on from, or None."""


class Patience(Model):
    """How often and how long a trial is tried, and what is known of earlier tries."""

    retries: int = Field(0, ge=0, description="how often a lost or stuck worker or node is made up for")
    silent_seconds: float = Field(1800, gt=0, description="a worker that ends no step for so long is stuck")
    trial_seconds: float | None = Field(None, gt=0, description="longest a trial may hold its devices, all attempts")
    held_seconds: float | None = Field(
        None, ge=0, description="that earlier attempts held them; empty: as far as checkpoints know"
    )
    logged_step: int = Field(-1, description="what was measured up to here is written down")


class TooLong(Exception):
    """The trial held its devices longer than a trial may: the point itself is too dear."""


class Preempted(Exception):
    """A node of the trial is about to be taken away; a checkpoint of this moment is in the storage."""


class Asked:
    """After every step, on all workers alike: whether a checkpoint is to be written now.

    It is due by the first worker's clock, or because any worker's node is about to be taken away.

    Args:
        agree: see `Agreement`.
        due_seconds: between checkpoints, on the first worker; on the others None.
        noticed: whether this worker was told that a node goes.
        spent: why the trial may not hold its devices any longer, if so.
        clock: seconds, monotonic.

    Attributes:
        preempted: a node goes, as all workers know by now.
    """

    def __init__(
        self,
        agree: Callable[..., list[bool]],
        due_seconds: float | None,
        noticed: Callable[[], bool],
        spent: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agree, self._due_seconds, self._noticed, self._spent = agree, due_seconds, noticed, spent
        self._clock, self._last = clock, clock()
        self.preempted = False

    def __call__(self) -> bool:
        """Ask.

        Raises:
            TooLong: of the trial, whatever is to be written.
        """
        due = self._due_seconds is not None and self._clock() - self._last >= self._due_seconds
        spent = self._spent()
        self.preempted, due, late = self._agree(self._noticed(), due, spent is not None)
        if late:
            raise TooLong(spent or "as another worker says")
        return self.preempted or due

    def written(self) -> None:
        """There is a checkpoint of now."""
        self._last = self._clock()


def node_goes() -> bool:
    """Whether Ray told this worker that a node of the trial is about to be taken away.

    `ray.train.get_preemption_info` says the same of the first worker, by way of an actor that all workers wait for.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    import torch.distributed as dist
    from ray.train.torch import get_device

    from trainables.data import depot
    from trainables.prepare import prepare
    from trainables.training.agreement import Agreement
    from trainables.training.clock import Clock, by_all
    from trainables.training.finetune import finetune
    from trainables.training.watchdog import Watchdog

    trial, patience = TrialConfig.model_validate(config["trial"]), Patience.model_validate(config["patience"])
    workers, device, minutes = trial.workers, get_device(), trial.training.checkpoint_minutes
    set_up(workers, device)
    clock, first = Clock(device, patience.held_seconds), ray.train.get_context().get_world_rank() == 0

    def spent() -> str | None:
        if patience.trial_seconds is None or clock.held <= patience.trial_seconds:
            return None
        return f"its devices were held for {clock.held:.0f} s, more than {patience.trial_seconds:.0f} s"

    def asked() -> bool:
        watchdog.step()
        return ask()

    def report(metrics: dict[str, Any], written: Future[Path] | None) -> None:
        uploads.report(metrics, written, wait=ask.preempted)
        ask.written()
        watchdog.beat()
        if ask.preempted:
            if dist.is_initialized():
                dist.barrier()  # the first worker's checkpoint is in the storage before any says so
            raise Preempted(f"a node is about to be taken away; there is a checkpoint of step {metrics['step']}")

    ask = Asked(Agreement(device), 60 * minutes if first else None, node_goes, spent)
    # Ray's is of this attempt, from before it replaced lost workers.
    path, checkpoint = config["checkpoint"], ray.train.get_checkpoint()
    if checkpoint is None and path is not None:
        files, folder_there = opened(path)
        checkpoint = ray.train.Checkpoint(folder_there, files)
    watchdog = Watchdog(patience.silent_seconds, lambda code: _exit_stuck(trial, code))
    try:
        with watchdog, tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            scratch, begun = Path(folder), None
            uploads = stack.enter_context(Uploads(scratch, clock.moved))
            if checkpoint is not None:
                begun = Path(stack.enter_context(checkpoint.as_directory()))
            with depot.sharing(trial.shared_cache):
                prepared = prepare(trial, lambda line: watchdog.beat(), watchdog.beat)
            clock.moved["prepared"] = by_all(depot.copied_bytes, device)
            finetune(
                trial,
                prepared,
                device,
                begun,
                scratch,
                report,
                config["passed_over"],
                asked,
                beat=watchdog.step,
                clock=clock,
                shelf=Shelf(trial, 60 * minutes, hurry=node_goes),
                logged=patience.logged_step,
            )
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
