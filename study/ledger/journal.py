"""What the trials' logs tell: measurements at rungs, attempts, verdicts. Unfinished trials have them nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from study.config import COST, COSTS, StudyConfig
from study.ledger.attempts import Attempts, count_ended, failures, unseen_ends
from study.ledger.sessions import SessionRow
from study.paths import StudyPaths
from study.records import Ended, Event, Manifest, TrialRecord, append_event, read_events
from study.search.rungs import RungTable
from trainables.results import Attempt, Cause

CAUSES: dict[Ended, Cause] = {
    "complete": "complete",
    "stopped": "stopped",
    "infeasible": "point",
    "failed": "infrastructure",
}
"""Of a trial's last attempt, where it is known only how the trial ended."""


class Journal:
    """The logs of all trials, kept in mind as they are written.

    Args:
        config: of the study.
        paths: its files; None writes nothing anywhere.
        clock: the time, in seconds.
        confirm: returns only while this process may write to the study's folder.

    Attributes:
        rungs: what trials measured.
    """

    def __init__(
        self, config: StudyConfig, paths: StudyPaths | None, clock: Callable[[], float], confirm: Callable[[], None]
    ) -> None:
        self._paths, self._clock, self._confirm = paths, clock, confirm
        self.rungs = RungTable(config.objectives, config.constraints, config.early_stopping)
        self._verdicts: dict[str, str] = {}
        self._hashes: dict[str, dict[str, str]] = {}
        self._attempts = Attempts()
        self._logged: set[tuple[str, int]] = set()
        self._retried: dict[str, float] = {}

    def read(
        self, records: Sequence[TrialRecord], manifests: Sequence[Manifest], drivers: Sequence[SessionRow]
    ) -> None:
        """What happened before: ended trials have it in their manifests, running ones in their logs.

        Args:
            records: all trials.
            manifests: all ended trials.
            drivers: that worked on the study, in order.
        """
        if self._paths is None:
            return
        count_ended(self._attempts, self._paths, manifests)
        for manifest in manifests:
            for step, metrics in manifest.rungs.items():
                self.rungs.add(manifest.key, step, metrics)
        ended = {manifest.key for manifest in manifests}
        logs: list[tuple[float, str, int, dict[str, float]]] = []
        for record in records:
            if record.state != "running" or record.key in ended:
                continue
            events = list(read_events(self._paths.events(record.key)))
            for attempt in unseen_ends(events, drivers):
                self.log(record, Event(time=self._clock(), event="attempt", step=attempt.to_step, attempt=attempt))
            for event in events:
                self._note(record.key, event)
            logs += [(event.time, record.key, event.step, event.metrics) for event in events if event.event == "rung"]
        for _, key, step, metrics in sorted(logs, key=lambda log: log[0]):
            self.rungs.add(key, step, metrics)

    def log(self, record: TrialRecord, event: Event) -> None:
        """Add to the trial's log."""
        if self._paths is not None:
            self._confirm()
            append_event(self._paths.events(record.key), event)
        self._note(record.key, event)

    def _note(self, key: str, event: Event) -> None:
        if event.attempt is not None:
            self._attempts.add(key, event.attempt)
        elif event.event in ("rung", "final"):
            self._logged.add((key, event.step))
            if event.message:
                self._verdicts[key] = event.message
            if event.hashes:
                self._hashes[key] = event.hashes
            if COST in event.metrics:
                self._attempts.report(key, event.metrics[COST])
        elif event.event == "retry":
            self._retried[key] = event.time

    def logged(self, record: TrialRecord, step: int) -> bool:
        """Whether the trial's log has what it measured at a step. A trial that goes on reports its last step again."""
        return (record.key, step) in self._logged

    def last_rung(self, record: TrialRecord) -> int:
        """Up to which step the trial's log has all that was measured; -1 if there is nothing yet."""
        return max(self.rungs.of(record.key), default=-1)

    def verdict(self, record: TrialRecord) -> str | None:
        """Why an interrupted trial must not go on: an earlier session stopped it, and ended before it wrote so."""
        return self._verdicts.get(record.key)

    def hashes(self, record: TrialRecord) -> dict[str, str]:
        """Of what the trial was made from, as far as it has said."""
        return self._hashes.get(record.key, {})

    def attempts(self, record: TrialRecord) -> list[Attempt]:
        """The trial's tries so far, in order."""
        return self._attempts.of(record.key)

    def failures(self, record: TrialRecord) -> list[Attempt]:
        """Those of its tries that count against `budget.max_failures`."""
        return failures(self.attempts(record), self._retried.get(record.key, 0.0))

    def device_seconds(self, record: TrialRecord) -> float | None:
        """What all its tries have held until now; None where none is known."""
        return self._attempts.device_seconds(record.key, self._clock())

    def held(self, device: str) -> dict[str, float]:
        """Device-seconds that all trials have held until now, by kind of device.

        Args:
            device: kind of device of the trials that do not say.
        """
        return self._attempts.held(self._clock(), device)

    def cost_so_far(self, record: TrialRecord) -> dict[str, Any]:
        """The cost of a manifest, of a trial that ends without a result."""
        cost: dict[str, Any] = {}
        if rungs := self.rungs.of(record.key):
            last = rungs[max(rungs)]
            cost = {**{field: last[cost] for cost, field in COSTS.items() if cost in last}, "steps": max(rungs)}
        if (held := self.device_seconds(record)) is not None:
            cost[COSTS[COST]] = held
        return cost

    def close(self, record: TrialRecord, state: Ended) -> None:
        """A trial that has ended holds nothing."""
        for attempt in self.attempts(record):
            if attempt.ended is None:
                changes = {"ended": max(self._clock(), attempt.began), "cause": CAUSES[state]}
                closed = attempt.model_copy(update=changes)
                self.log(record, Event(time=self._clock(), event="attempt", attempt=closed))

    def ended(self, manifest: Manifest) -> None:
        """What an ended trial has held is in its account."""
        self._attempts.ended(manifest)
