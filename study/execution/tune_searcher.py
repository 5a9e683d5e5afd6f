"""Ray Tune over the ledger. Tune is disposable: what is here holds nothing that cannot be read again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from search_spaces.notation import in_words, telling
from study.config import COST, COSTS
from study.execution.admission import Anywhere, Place, Places
from study.execution.bad_nodes import bad_nodes, failed_on
from study.ledger.ledger import Ledger
from study.records import Event, Manifest, TrialRecord
from trainables.config import TrialConfig
from trainables.execution.reserved import node_id
from trainables.execution.worker import Patience
from trainables.results import Attempt, Cause, Outcome, given_up


@dataclass
class Running:
    """An attempt under way.

    Attributes:
        record: the trial.
        trial: as it runs.
        place: whose devices it holds.
        attempt: its record, still open.
        home: id of the node with the trial's own process, which only waits.
    """

    record: TrialRecord
    trial: TrialConfig
    place: Place
    attempt: Attempt
    home: str = ""


class LedgerSearcher(Searcher):
    """Hands out trials that are to be tried again first, then recipes, then what the sampler proposes.

    What comes back is written: reports, and each attempt when it begins and when it has ended. An attempt that ended
    without a result is followed by another; those that the cluster broke are counted.

    Args:
        ledger: the study.
        make_trial: from a taken trial to the configuration that runs it.
        patience: with a trial.
        may_start: whether the budget has room for another trial. Interrupted ones go on all the same.
        on_change: called with (trial, event or manifest) for display and tracking.
        clock: the time, in seconds.
        places: where devices come from.
    """

    def __init__(
        self,
        ledger: Ledger,
        make_trial: Callable[[TrialRecord], TrialConfig],
        patience: Patience,
        may_start: Callable[[], bool],
        on_change: Callable[[TrialRecord, Event | Manifest], None],
        clock: Callable[[], float] = time.time,
        places: Places | None = None,
    ) -> None:
        super().__init__()
        self._ledger, self._make_trial, self._clock = ledger, make_trial, clock
        self._patience, self._may_start, self._on_change = patience, may_start, on_change
        self._places = places or Anywhere()
        self._queue = ledger.remaining().resume
        self._begun: dict[int, TrialRecord] = {}
        self._taken: dict[str, Running] = {}
        self._resumed: dict[int, tuple[int, list[str]]] = {}
        self._stopped: dict[str, str] = {}
        tries = {record.key: ledger.journal.attempts(record) for record in ledger.records()}
        self._tried_again = {key: found for key, found in tries.items() if len(found) > 1}
        self._places.leave_out(bad_nodes(self._tried_again))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's configuration, None if there are no devices yet, or no database, or FINISHED."""
        if not self._places.due() or not self._ledger.in_touch():
            return None
        left = len(self._queue) + (self._ledger.left() if self._may_start() else 0)
        place = self._places.take(len(self._taken), left)
        if place is None:
            return None if left or self._taken else str(Searcher.FINISHED)
        while (record := self._next(place)) is not None:
            trial = self._make_trial(record)
            if (reason := self._ledger.journal.verdict(record)) is None:
                return self._hand_out(trial_id, record, trial, place)
            self._end(record, self._ledger.stop(record, reason, trial))
        self._places.give_back(place)
        return None

    def _next(self, place: Place) -> TrialRecord | None:
        """The next trial: first those that are to be tried again, though not where they failed if there are others."""
        number = next((number for number in self._queue if not self._shuns(number, place)), None)
        if number is None and self._may_start() and (fresh := self._ledger.take_next()) is not None:
            return fresh
        if not self._queue:
            return None
        self._queue.remove(number := self._queue[0] if number is None else number)
        return self._begun.get(number) or self._ledger.take(number)

    def _shuns(self, number: int, place: Place) -> bool:
        """Whether the trial failed there and could run elsewhere: on one node it would give way to all others."""
        tries = self._ledger.journal.attempts(self._begun[number]) if number in self._begun else []
        nodes = {node for tried in tries[-1:] if (node := failed_on(tried)) is not None}
        return not nodes.isdisjoint(place.nodes) and self._places.elsewhere(nodes)

    def _hand_out(self, trial_id: str, record: TrialRecord, trial: TrialConfig, place: Place) -> dict[str, Any]:
        if record.number not in self._begun:
            self._begun[record.number] = record
            self._write(record, Event(time=self._clock(), event="start", message=_describe(record, trial)))
        devices = trial.workers.count * trial.workers.share
        begun = Attempt(began=self._clock(), nodes=list(place.nodes), devices=devices, device=place.kind)
        known = {
            "held_seconds": (self._ledger.journal.device_seconds(record) or 0.0) / devices,
            "logged_step": self._ledger.journal.last_rung(record),
        }
        patience = self._patience.model_copy(update=known).model_dump()
        self._taken[trial_id] = Running(record, trial, place, begun)
        self._write_attempt(record, begun)
        return {"trial": trial.model_dump(mode="json"), "patience": patience, "place": place.id}

    def rung(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Log a report of a trial, and say whether it goes on."""
        if trial_id not in self._taken:
            return True
        running = self._taken[trial_id]
        if "nodes" in result:
            self._by_rank(running, result["nodes"], result["home"])
        if "step" not in result:
            return True
        record, trial = running.record, running.trial
        step, resumed = int(result["step"]), int(result["resumed_from_step"])
        passed_over = json.loads(result.get("passed_over", "[]"))
        if (resumed, passed_over) != self._resumed.get(record.number, (-1, [])):  # by a session, or another attempt
            self._resumed[record.number] = resumed, passed_over
            message = "; ".join([f"from step {max(0, resumed)}", *passed_over])
            self._write(record, Event(time=self._clock(), event="resume", step=max(0, resumed), message=message))
        steps = {"from_step": max(0, resumed), "to_step": max(running.attempt.to_step, step)}
        running.attempt = running.attempt.model_copy(update=steps)
        if "history" not in result or self._ledger.journal.logged(record, step):  # a checkpoint only, or told once more
            return True
        metrics = {name: float(result[name]) for name in trial.protocol.metric_names if name in result}
        metrics |= {cost: float(result[field]) for cost, field in COSTS.items() if field in result}
        if (held := self._ledger.journal.device_seconds(record)) is not None:
            metrics[COST] = held
        reason = None if result["last"] else self._ledger.rung(record, step, int(result["epoch"]), metrics)
        history, hashes = json.loads(result["history"]), json.loads(result.get("hashes", "{}"))
        kind = "final" if result["last"] else "rung"
        event = Event(time=self._clock(), event=kind, step=step, metrics=metrics, history=history, hashes=hashes)
        self._write(record, event.model_copy(update={"message": reason or ""}))
        if reason is not None:
            self._stopped[trial_id] = reason
            self._places.give_back(running.place)  # ends the workers, without waiting for them
        return reason is None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Account for an attempt, and for the trial if that has ended."""
        if trial_id not in self._taken:
            return
        running = self._taken.pop(trial_id)
        self._places.give_back(running.place)
        record, stopped = running.record, self._stopped.pop(trial_id, None)
        outcome: Outcome | None = None
        if stopped is not None:
            ended = self._close(running, "stopped", stopped)
        elif result and result.get("attempt"):
            ended = self._close(running, **self._told(running, Attempt.model_validate_json(result["attempt"])))
            outcome = Outcome.model_validate_json(result["outcome"]) if result["outcome"] else None
        else:
            nodes = {running.home, *map(node_id, running.attempt.nodes)}
            cause: Cause = "infrastructure" if self._places.reclaimed().isdisjoint(nodes) else "preempted"
            ended = self._close(running, cause, "the process of the trial was lost")
        self._write_attempt(record, ended)
        if stopped is not None:
            self._end(record, self._ledger.stop(record, stopped, running.trial))
        elif outcome := outcome or self._given_up(record, ended):
            self._end(record, self._ledger.finish(record, outcome, running.trial))
        else:
            self._queue.insert(0, record.number)
        if len(tries := self._ledger.journal.attempts(record)) > 1:
            self._tried_again[record.key] = tries
            self._places.leave_out(bad_nodes(self._tried_again))

    def interrupt(self) -> None:
        """The session ends: so do all attempts."""
        for running in self._taken.values():
            self._write_attempt(running.record, self._close(running, "interrupted", "the study was stopped"))
        self._taken.clear()

    def _by_rank(self, running: Running, ids: list[str], home: str) -> None:
        """The nodes of an attempt were known before its workers were."""
        names = {node_id(name): name for name in running.attempt.nodes}
        nodes = [names.get(node, node) for node in ids]
        running.home = home
        if nodes != running.attempt.nodes:
            running.attempt = running.attempt.model_copy(update={"nodes": nodes})
            self._write_attempt(running.record, running.attempt)

    def _told(self, running: Running, told: Attempt) -> dict[str, Any]:
        """What the trial's own process knows better than this one."""
        steps = {"from_step": told.from_step, "to_step": max(told.to_step, running.attempt.to_step)}
        nodes = told.nodes or running.attempt.nodes
        return {"cause": told.cause, "reason": told.reason, "failed_on": told.failed_on, "nodes": nodes, **steps}

    def _close(self, running: Running, cause: Cause, reason: str, **fields: Any) -> Attempt:
        """The record of an attempt that has ended: devices were held until now, or never if it was still queued."""
        ended = running.attempt.began if cause == "queued" else self._clock()
        return running.attempt.model_copy(update={"ended": ended, "cause": cause, "reason": reason, **fields})

    def _given_up(self, record: TrialRecord, ended: Attempt) -> Outcome | None:
        if ended.cause != "infrastructure":
            return None
        failures = self._ledger.journal.failures(record)
        return given_up([tried.reason for tried in failures]) if len(failures) > self._patience.retries else None

    def _write_attempt(self, record: TrialRecord, attempt: Attempt) -> None:
        event = Event(time=self._clock(), event="attempt", step=attempt.to_step, attempt=attempt)
        self._write(record, event)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into a session's folder; nothing of ours belongs there."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def _write(self, record: TrialRecord, event: Event) -> None:
        self._ledger.journal.log(record, event)
        self._on_change(record, event)

    def _end(self, record: TrialRecord, manifest: Manifest) -> None:
        self._ledger.journal.log(record, Event(time=self._clock(), event="end", message=manifest.state))
        self._on_change(record, manifest)


class HalvingScheduler(FIFOScheduler):
    """Ray Tune's scheduler: first come, first served; what the ledger says must stop is stopped.

    Args:
        searcher: logs the reports and asks the ledger.
    """

    def __init__(self, searcher: LedgerSearcher) -> None:
        super().__init__()
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE or STOP."""
        if self._searcher.rung(trial.trial_id, result):
            return str(TrialScheduler.CONTINUE)
        return str(TrialScheduler.STOP)

    def __getstate__(self) -> dict[str, Any]:
        """As for the searcher: nothing of ours belongs into Tune's snapshots."""
        return {}


def _describe(record: TrialRecord, trial: TrialConfig) -> str:
    return in_words(telling(record.params, trial.point.model_dump(mode="json")))
