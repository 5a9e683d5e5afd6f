"""Ray Tune's `Searcher` over the ledger. Tune is disposable: this holds nothing that cannot be read again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from study.ledger import Ledger
from study.records import Event, Manifest, StudyPaths, TrialRecord, append_event
from trainables.config import TrialConfig
from trainables.trial import Outcome, Patience


class LedgerSearcher(Searcher):
    """Hands out interrupted trials first, then recipes, then what the sampler proposes; writes what comes back.

    Args:
        ledger: the study.
        paths: its files.
        make_trial: from a taken trial to the configuration that runs it.
        patience: with a trial.
        may_start: whether the budget has room for another trial. Interrupted ones go on all the same.
        on_change: called with (what happened, trial, event or manifest) for display and tracking.
    """

    def __init__(
        self,
        ledger: Ledger,
        paths: StudyPaths,
        make_trial: Callable[[TrialRecord], TrialConfig],
        patience: Patience,
        may_start: Callable[[], bool],
        on_change: Callable[[TrialRecord, Event | Manifest], None],
    ) -> None:
        super().__init__()
        self._ledger, self._paths, self._make_trial = ledger, paths, make_trial
        self._patience, self._may_start, self._on_change = patience, may_start, on_change
        self._interrupted = ledger.plan().go_on
        self._taken: dict[str, tuple[TrialRecord, TrialConfig]] = {}
        self._seen_step: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's configuration, or FINISHED."""
        if self._interrupted:
            record = self._ledger.take(self._interrupted.pop(0))
        elif not self._may_start():
            return str(Searcher.FINISHED)
        elif any(other.state == "waiting" for other in self._ledger.records()) or self._ledger.plan().fresh:
            record = self._ledger.take()
        else:
            return str(Searcher.FINISHED)
        trial = self._make_trial(record)
        self._taken[trial_id] = record, trial
        self._write(record, Event(time=time.time(), event="start", message=_describe(trial)))
        return {"trial": trial.model_dump(mode="json"), "patience": self._patience.model_dump()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Log a rung."""
        if trial_id not in self._taken or "history" not in result:
            return
        record, trial = self._taken[trial_id]
        step, resumed = int(result["step"]), int(result["resumed_from_step"])
        if trial_id not in self._seen_step and resumed >= 0:
            self._write(record, Event(time=time.time(), event="resume", step=resumed, message=f"from step {resumed}"))
        if self._seen_step.get(trial_id, -1) >= step:
            return
        self._seen_step[trial_id] = step
        metrics = {name: float(result[name]) for name in trial.protocol.metric_names if name in result}
        metrics["device_seconds"] = float(result["device_seconds"])
        history = json.loads(result["history"])
        self._write(record, Event(time=time.time(), event="rung", step=step, metrics=metrics, history=history))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Account for the trial."""
        if trial_id not in self._taken:
            return
        record, trial = self._taken.pop(trial_id)
        if result and "outcome" in result:
            outcome = Outcome.model_validate_json(result["outcome"])
        else:
            outcome = Outcome(state="failed", reason="the process of the trial was lost, more often than allowed")
        ended = Event(time=time.time(), event="end", message=outcome.state)
        append_event(self._paths.events(record.key), ended)
        self._on_change(record, self._ledger.finish(record, outcome, trial))

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into a session's folder; nothing of ours belongs there."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def _write(self, record: TrialRecord, event: Event) -> None:
        append_event(self._paths.events(record.key), event)
        self._on_change(record, event)


def _describe(trial: TrialConfig) -> str:
    return " ".join(f"{name}={value}" for name, value in trial.point.model_dump(mode="json").items())
