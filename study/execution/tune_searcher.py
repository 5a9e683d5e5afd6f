"""Ray Tune over the ledger. Tune is disposable: what is here holds nothing that cannot be read again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from search_spaces.notation import in_words, telling
from study.config import COST, COSTS
from study.ledger.ledger import Ledger
from study.records import Event, Manifest, TrialRecord
from trainables.config import TrialConfig
from trainables.execution.stoppable import abort
from trainables.execution.worker import Patience
from trainables.results import Outcome


class LedgerSearcher(Searcher):
    """Hands out interrupted trials first, then recipes, then what the sampler proposes; writes what comes back.

    Args:
        ledger: the study.
        make_trial: from a taken trial to the configuration that runs it.
        patience: with a trial.
        may_start: whether the budget has room for another trial. Interrupted ones go on all the same.
        on_change: called with (trial, event or manifest) for display and tracking.
        clock: the time, in seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        make_trial: Callable[[TrialRecord], TrialConfig],
        patience: Patience,
        may_start: Callable[[], bool],
        on_change: Callable[[TrialRecord, Event | Manifest], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        self._ledger, self._make_trial, self._clock = ledger, make_trial, clock
        self._patience, self._may_start, self._on_change = patience, may_start, on_change
        self._interrupted = ledger.remaining().resume
        self._taken: dict[str, tuple[TrialRecord, TrialConfig]] = {}
        self._resumed: dict[str, tuple[int, list[str]]] = {}
        self._stopped: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's configuration, None if there is none yet, or FINISHED."""
        if self._interrupted:
            record: TrialRecord | None = self._ledger.take(self._interrupted.pop(0))
        elif self._may_start():
            record = self._ledger.take_next()
        else:
            return str(Searcher.FINISHED)
        if record is None:
            return None if self._ledger.more_to_come() else str(Searcher.FINISHED)
        trial = self._make_trial(record)
        if (reason := self._ledger.verdict(record)) is not None:
            self._end(record, self._ledger.stop(record, reason, trial))
            return self.suggest(trial_id)
        self._taken[trial_id] = record, trial
        self._write(record, Event(time=self._clock(), event="start", message=_describe(record, trial)))
        return {"trial": trial.model_dump(mode="json"), "patience": self._patience.model_dump()}

    def rung(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Log a report of a trial, and say whether it goes on."""
        if trial_id not in self._taken or "history" not in result:
            return True
        record, trial = self._taken[trial_id]
        step, resumed = int(result["step"]), int(result["resumed_from_step"])
        passed_over = json.loads(result.get("passed_over", "[]"))
        if (resumed, passed_over) != self._resumed.get(trial_id, (-1, [])):  # by a session, or after a worker was lost
            self._resumed[trial_id] = resumed, passed_over
            message = "; ".join([f"from step {max(0, resumed)}", *passed_over])
            self._write(record, Event(time=self._clock(), event="resume", step=max(0, resumed), message=message))
        if self._ledger.logged(record, step):
            return True
        metrics = {name: float(result[name]) for name in trial.protocol.metric_names if name in result}
        metrics |= {cost: float(result[field]) for cost, field in COSTS.items() if field in result}
        if (held := self._ledger.device_seconds(record)) is not None:
            metrics[COST] = held
        reason = None if result["last"] else self._ledger.rung(record, step, int(result["epoch"]), metrics)
        history = json.loads(result["history"])
        kind = "final" if result["last"] else "rung"
        event = Event(time=self._clock(), event=kind, step=step, metrics=metrics, history=history)
        self._write(record, event.model_copy(update={"message": reason or ""}))
        if reason is not None:
            self._stopped[trial_id] = reason
        return reason is None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Account for the trial."""
        if trial_id not in self._taken:
            return
        record, trial = self._taken.pop(trial_id)
        if trial_id in self._stopped:
            self._end(record, self._ledger.stop(record, self._stopped.pop(trial_id), trial))
        elif result and "outcome" in result:
            self._end(record, self._ledger.finish(record, Outcome.model_validate_json(result["outcome"]), trial))
        else:
            lost = Outcome(state="failed", reason="the process of the trial was lost, more often than allowed")
            self._end(record, self._ledger.finish(record, lost, trial))

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into a session's folder; nothing of ours belongs there."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def _write(self, record: TrialRecord, event: Event) -> None:
        self._ledger.log(record, event)
        self._on_change(record, event)

    def _end(self, record: TrialRecord, manifest: Manifest) -> None:
        self._ledger.log(record, Event(time=self._clock(), event="end", message=manifest.state))
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
        abort(result)
        return str(TrialScheduler.STOP)

    def __getstate__(self) -> dict[str, Any]:
        """As for the searcher: nothing of ours belongs into Tune's snapshots."""
        return {}


def _describe(record: TrialRecord, trial: TrialConfig) -> str:
    return in_words(telling(record.params, trial.point.model_dump(mode="json")))
