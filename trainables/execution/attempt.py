"""One attempt of a trial: one Ray Train run, from the newest whole checkpoint to whatever ends it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ReportCallback, WorkerGroupCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import PreemptionError

from trainables.config import TrialConfig
from trainables.execution.blame import Blame, blame, kind_of, told
from trainables.execution.checkpoints import KEPT, RESULT, Checkpoint, CheckpointError, RunFolder
from trainables.execution.process_group import ProcessGroup
from trainables.execution.reserved import demand, devices_on, held_on, reclaimed_nodes, take_place
from trainables.execution.worker import WENT_ON_FROM, Patience, take_marker, worker
from trainables.files import ray_storage
from trainables.results import Attempt, Cause, Outcome, TrialResult

NOT_FOR_US = (PlacementGroupCleanerCallback, DatasetsCallback)

PEER_SECONDS = 10.0
"""How long to look at the other ranks when one has only lost its connection to them."""


class Follow(WorkerGroupCallback, ReportCallback):
    """In Train's controller: puts the workers where devices are held for them, and tells what becomes of them.

    Args:
        group: the placement group that they use.
        reports: a `ray.util.queue.Queue` for what rank 0 reports, and `{"nodes": ...}` by rank before that; or None.
    """

    def __init__(self, group: Any, reports: Any = None) -> None:
        self._group, self._reports = group, reports
        self._workers: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Called by Ray Train."""
        take_place(self._group)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray Train."""
        self._workers = worker_group
        self._tell({"nodes": [worker.metadata.node_id for worker in worker_group.get_workers()]})

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """Called by Ray Train."""
        self._tell(metrics[0])

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Called by Ray Train. A rank that lost its peers may be heard before it is known what became of them."""
        found = worker_group_status.worker_statuses
        end = time.monotonic() + PEER_SECONDS
        while unexplained(found) and time.monotonic() < end:
            time.sleep(0.1)
            for rank, status in enumerate(self._workers._poll_workers_and_collect_errors(1.0)):
                if found[rank].error is None and status.error is not None:
                    found[rank] = status

    def _tell(self, message: dict[str, Any]) -> None:
        if self._reports is not None:
            self._reports.put(message)


def unexplained(statuses: dict[int, Any]) -> bool:
    """Whether all failures so far are those of ranks that lost others, and others may still tell more."""
    failures = [status.error for status in statuses.values() if status.error is not None]
    running = any(status.running and status.error is None for status in statuses.values())
    return running and bool(failures) and all(kind_of(failure) == "collateral" for failure in failures)


class Trainer(DataParallelTrainer):
    """Without what Ray Train does for others.

    Its cleaner gives back what was reserved, which whoever reserved it does; it asks Ray's dashboard whether the
    controller is alive, and goes on asking where there is none. Data sets of Ray have a process on the head.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, NOT_FOR_US)]


def attempt(
    config: TrialConfig, patience: Patience, group: Any, reports: Any, nodes: list[str]
) -> tuple[Attempt, Outcome | None]:
    """Run the trial once, going on from its last checkpoint if it has run before.

    A checkpoint that cannot be read is passed over: the one before it is taken, and without one the trial begins anew.

    Args:
        config: `storage_path` and `key` name the run: the same pair finds the same checkpoints.
        patience: with it.
        group: the placement group whose devices are held for it.
        reports: see `Follow`.
        nodes: ids of the workers' nodes by rank, read at the end: whoever reads `reports` may fill it.

    Returns:
        What happened, and how the trial ended; None if it is to be tried again.
    """
    began = time.time()
    if "://" not in config.storage_path:
        config = config.model_copy(update={"storage_path": str(Path(config.storage_path).resolve())})
    run, from_step = RunFolder(config), 0
    bundles = held_on(group) or []
    outcome: Outcome | None = None
    try:
        passed_over = run.incomplete()
        while True:
            checkpoint = run.begin(passed_over)
            from_step = checkpoint.state["step"] if checkpoint else 0
            try:
                result = _trainer(config, patience, Follow(group, reports), checkpoint, [*passed_over.values()]).fit()
            except WorkerGroupError as error:
                if not (damaged := _damaged(error.worker_failures)):
                    raise
                passed_over |= damaged
            else:
                outcome = _complete(run, result.checkpoint)
                found = Blame("complete", "", -1)
                break
    except Exception as error:
        found = why(error, nodes or bundles, config, patience)
        outcome = outcome_of(found)
    where = devices_on(nodes or bundles)
    ended = Attempt(
        began=began,
        ended=time.time(),
        nodes=where.nodes,
        devices=config.workers.count * config.workers.share,
        device=where.kind,
        from_step=from_step,
        to_step=max([from_step, *(checkpoint.state["step"] for checkpoint in run.checkpoints())]),
        cause=found.cause,
        reason=found.reason,
        failed_on=where.nodes[found.rank] if 0 <= found.rank < len(where.nodes) else "",
    )
    return ended, outcome


def why(error: Exception, nodes: Sequence[str], config: TrialConfig, patience: Patience) -> Blame:
    """What ended a Ray Train run.

    Args:
        error: that it raised.
        nodes: ids of its workers' nodes by rank.
        config: of the trial.
        patience: with it.
    """
    reclaimed = reclaimed_nodes()
    if isinstance(error, WorkerGroupError):
        found = blame(error.worker_failures, nodes, reclaimed)
        if take_marker(config, "stuck") is not None and found.cause == "infrastructure":
            return Blame(found.cause, f"silent for more than {patience.silent_seconds:g} s", found.rank)
        return found
    cause: Cause = "infrastructure"
    if isinstance(error, PreemptionError) or not reclaimed.isdisjoint(nodes):
        cause = "preempted"
    elif isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
        cause = "queued"
    return Blame(cause, told(error) if isinstance(error, RayError) else last_line(error), -1)


def outcome_of(found: Blame) -> Outcome | None:
    """How a trial ends by what is its own fault; None if it is to be tried again."""
    if found.cause in ("point", "out_of_memory"):
        return Outcome(state="infeasible", reason=found.reason)
    if found.cause == "bug":
        return Outcome(state="failed", reason=found.reason, trace=found.trace)
    return None


def last_line(error: Exception) -> str:
    """Type of an exception, and the last line of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def _complete(run: RunFolder, checkpoint: Any) -> Outcome:
    with checkpoint.as_directory() as folder:
        text = (Path(folder) / RESULT).read_text(encoding="utf-8")
    run.keep(1)
    return Outcome(state="complete", result=TrialResult.model_validate_json(text))


def _damaged(failures: dict[int, Exception]) -> dict[str, str]:
    """Names of checkpoints that workers could not read, and why."""
    found = (failure for failure in failures.values() if type(failure).__name__ == CheckpointError.__name__)
    return {name: str(failure) for failure in found if (name := getattr(failure, WENT_ON_FROM, None)) is not None}


def _trainer(
    config: TrialConfig, patience: Patience, follow: Follow, checkpoint: Checkpoint | None, passed_over: Sequence[str]
) -> Trainer:
    workers = config.workers
    return Trainer(
        worker,
        train_loop_config={
            "trial": config.model_dump(mode="json"),
            "patience": patience.model_dump(),
            "checkpoint": checkpoint and checkpoint.path,
            "passed_over": passed_over,
        },
        backend_config=ProcessGroup("nccl" if workers.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=bool(workers.gpus_per_worker),
            resources_per_worker=demand(workers),
        ),
        run_config=RunConfig(
            name=config.key,
            **ray_storage(config.storage_path),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
            # Whatever happens ends the run: what comes next is decided where all attempts are known.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            callbacks=[follow],
        ),
    )
