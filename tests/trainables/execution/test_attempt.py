"""How one Ray Train run ends, and what is asked of its other ranks before that is told."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo

from tests.trainables.execution.test_blame import KINDS
from trainables.config import TrialConfig
from trainables.execution import attempt as module
from trainables.execution.attempt import Follow, outcome_of, why
from trainables.execution.worker import Patience
from trainables.results import Cause, Outcome

LOST, GLOO, MEMORY, BUG = (KINDS[kind][0]() for kind in ("lost", "collateral", "memory", "bug"))
AWAY = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})


@pytest.mark.parametrize(
    ("error", "reclaimed", "cause"),
    [
        (ControllerError(WorkerGroupStartupTimeoutError(2)), (), "queued"),
        (ControllerError(WorkerGroupStartupFailedError("died while it started")), (), "infrastructure"),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), ("b",), "preempted"),
        (PreemptionError(AWAY), (), "preempted"),
        (ActorDiedError(), (), "infrastructure"),  # the controller itself
        (ActorDiedError(), ("b",), "preempted"),
        (ActorDiedError(), ("c",), "infrastructure"),
        (OSError("the storage"), (), "infrastructure"),
        (WorkerGroupError("", {0: GLOO, 1: LOST}), ("b",), "preempted"),
        (WorkerGroupError("", {0: GLOO, 1: LOST}), (), "infrastructure"),
        (WorkerGroupError("", {0: GLOO, 1: MEMORY}), ("b",), "out_of_memory"),
        (WorkerGroupError("", {0: GLOO, 1: BUG}), (), "bug"),
    ],
)
def test_why_a_run_ended(
    error: Exception, reclaimed: Collection[str], cause: Cause, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(module, "reclaimed_nodes", lambda: set(reclaimed))
    trial = TrialConfig(key="k", storage_path=str(tmp_path))
    found = why(error, ["a", "b"], trial, Patience())
    assert found.cause == cause
    assert found.reason
    ends = {"out_of_memory": "infeasible", "bug": "failed"}
    assert (outcome_of(found) or Outcome(state="complete")).state == ends.get(cause, "complete")


def statuses(*errors: Exception | None, running: bool = True) -> dict[int, Any]:
    found = (SimpleNamespace(error=error, running=error is None and running) for error in errors)
    return dict(enumerate(found))


@pytest.mark.parametrize(
    ("first", "asked", "found"),
    [
        ((GLOO, None), [(GLOO, None), (GLOO, MEMORY)], [GLOO, MEMORY]),  # heard last, and it explains all
        ((None, GLOO), [(LOST, GLOO)], [LOST, GLOO]),
        ((BUG, None), [], [BUG, None]),  # a rank that explains itself is not waited with
        ((GLOO, GLOO), [], [GLOO, GLOO]),  # nobody is left to ask
        ((None, None), [], [None, None]),
        ((GLOO, None, None), [(GLOO, None, GLOO), (GLOO, BUG, None)], [GLOO, BUG, GLOO]),
    ],
)
def test_ranks_that_lost_others_have_these_looked_at(
    first: tuple[Exception | None, ...],
    asked: list[tuple[Exception | None, ...]],
    found: list[Exception | None],
) -> None:
    answers = iter(asked)
    polled = SimpleNamespace(
        get_workers=list, _poll_workers_and_collect_errors=lambda seconds: statuses(*next(answers)).values()
    )
    follow = Follow(None)
    follow.after_worker_group_start(polled)
    status = SimpleNamespace(worker_statuses=statuses(*first))
    follow.after_worker_group_poll_status(status)
    assert [one.error for one in status.worker_statuses.values()] == found
    assert next(answers, None) is None


def test_ranks_that_hang_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PEER_SECONDS", 0.3)
    hanging = SimpleNamespace(
        get_workers=list, _poll_workers_and_collect_errors=lambda seconds: statuses(GLOO, None).values()
    )
    follow = Follow(None)
    follow.after_worker_group_start(hanging)
    follow.after_worker_group_poll_status(SimpleNamespace(worker_statuses=statuses(GLOO, None)))
