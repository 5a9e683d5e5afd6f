"""Trials as the database has them, and what is left to do with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from study.ledger.rows import EARLIER, OUTSIDE
from study.ledger.trials import replicate_key, trial_key
from study.records import INFEASIBLE, State, TrialRecord


@dataclass(frozen=True)
class Remaining:
    """What to do with the trials that exist.

    Attributes:
        tell: numbers of running trials whose manifest is there: they only have to be told.
        resume: numbers of running trials without one: they were interrupted.
        fresh: how many searched trials are still to be asked for.
    """

    tell: list[int]
    resume: list[int]
    fresh: int


def remaining(records: Sequence[TrialRecord], with_manifest: Collection[str], budget: int) -> Remaining:
    """Decide from what exists.

    Args:
        records: all trials of the database.
        with_manifest: keys of trials that have a manifest.
        budget: how many searched trials there shall be.
    """
    running = [record for record in records if record.state == "running"]
    searched = sum(record.searched for record in records)
    return Remaining(
        tell=[record.number for record in running if record.key in with_manifest],
        resume=[record.number for record in running if record.key not in with_manifest],
        fresh=max(0, budget - searched),
    )


def record_of(frozen: optuna.trial.FrozenTrial, name: str) -> TrialRecord:
    """A trial of the study of that name."""
    replicate = frozen.user_attrs.get("replicate", 0)
    return TrialRecord(
        number=frozen.number,
        key=replicate_key(trial_key(name, frozen.user_attrs.get("replicate_of", frozen.number)), replicate),
        state=_state(frozen.state, frozen.user_attrs),
        params=dict(frozen.user_attrs.get(OUTSIDE, frozen.params)),
        recipe=frozen.user_attrs.get("recipe"),
        replicate=replicate,
        reruns=len(frozen.user_attrs.get(EARLIER, [])),
    )


def _state(state: TrialState, attributes: Mapping[str, Any]) -> State:
    if INFEASIBLE in attributes and state.is_finished():  # the attribute is written first
        return "infeasible"
    states: dict[TrialState, State] = {
        TrialState.PRUNED: "stopped",
        TrialState.WAITING: "waiting",
        TrialState.RUNNING: "running",
        TrialState.COMPLETE: "complete",
        TrialState.FAIL: "failed",
    }
    return states[state]
