"""What trials have held of devices: every attempt of every trial, whatever its end, and what all add up to.

The driver logs an attempt when it holds its devices, and again when it has let them go. An attempt that has only the
first was not seen to end, for its driver was killed: it ended when that driver gave its last sign of life.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from search_spaces.notation import duration
from study.config import COST
from study.paths import StudyPaths
from study.records import Event, Manifest, TrialRecord, read_events, read_manifest
from trainables.files import below
from trainables.results import Attempt

if TYPE_CHECKING:
    from study.ledger.sessions import SessionRow

COUNTED = ("infrastructure", "bug")
"""Causes that use up `budget.max_failures`; waiting, preemption and a driver that ended are nobody's failure."""

ENDS = ("complete", "stopped", "out_of_memory", "point", "bug")
"""Causes after which a trial has ended by itself."""


def attempts_of(events: Iterable[Event]) -> list[Attempt]:
    """The tries that a log tells of, in order. What was written first of an end stays."""
    found: dict[float, Attempt] = {}
    for event in events:
        if event.attempt is not None and _is_news(event.attempt, found):
            found[event.attempt.began] = event.attempt
    return sorted(found.values(), key=lambda attempt: attempt.began)


def failures(attempts: Iterable[Attempt], since: float = 0.0) -> list[Attempt]:
    """Those that count against `budget.max_failures`, of those that began since then."""
    return [attempt for attempt in attempts if attempt.cause in COUNTED and attempt.began >= since]


def unseen_ends(events: Sequence[Event], sessions: Sequence[SessionRow]) -> list[Attempt]:
    """The attempts that nobody saw end, with the end they must have had.

    Args:
        events: a trial's log, which no driver writes to.
        sessions: of drivers, in order.
    """
    found = []
    for attempt in attempts_of(events):
        if attempt.ended is not None:
            continue
        place = next(n for n, event in enumerate(events) if event.attempt and event.attempt.began == attempt.began)
        own = events[place:]
        beats = [row.heartbeat for row in sessions if row.started <= attempt.began]
        ended = max([attempt.began, *beats[-1:], *(event.time for event in own)])
        to_step = max([attempt.to_step, *(event.step for event in own if event.event in ("rung", "final"))])
        from_step = max([attempt.from_step, *(event.step for event in own if event.event == "resume")])
        steps = {"from_step": from_step, "to_step": max(from_step, to_step)}
        changes = {"ended": ended, **steps, "cause": "interrupted", "reason": "its driver was killed"}
        found.append(attempt.model_copy(update=changes))
    return found


def lost_seconds(attempts: Sequence[Attempt]) -> float:
    """Device-seconds that brought nothing: of an attempt that another followed, the share of its steps that were done
    again, and all of it where it came to none.
    """
    lost = 0.0
    for attempt, after in zip(attempts, [*attempts, None][1:], strict=True):
        if after is None and (attempt.cause is None or attempt.cause in ENDS):
            continue
        went_on = attempt.to_step if after is None else after.from_step
        kept, done = went_on - attempt.from_step, max(attempt.to_step, went_on) - attempt.from_step
        lost += attempt.device_seconds * (1 - max(0, kept) / done if done > 0 else 1)
    return lost


def in_words(attempt: Attempt) -> str:
    """Where an attempt runs, or how it ended."""
    if attempt.ended is None:
        kind = f" {attempt.device}" if attempt.device else ""
        return f"holds {attempt.devices:g}{kind} on {', '.join(attempt.nodes) or 'this machine'}"
    held = duration(attempt.ended - attempt.began)
    told = f"{(attempt.cause or '').replace('_', ' ')} after {held} at step {attempt.to_step}"
    return f"{told}: {attempt.reason}" if attempt.reason else told


def message_of(event: Event) -> str:
    """What a line of a trial's log says, in words."""
    return event.message if event.attempt is None else in_words(event.attempt)


def causes(attempts: Iterable[Attempt]) -> dict[str, int]:
    """How many of them ended by which cause."""
    return dict(Counter(attempt.cause for attempt in attempts if attempt.cause is not None))


def troubles(attempts: Sequence[Attempt]) -> str:
    """What went wrong until now: `preempted twice, 0.4 device-hours lost`; empty if nothing did."""
    times = {1: "once", 2: "twice"}
    found = [(cause, count) for cause, count in causes(attempts).items() if cause not in ("complete", "stopped")]
    told = [f"{cause.replace('_', ' ')} {times.get(count, f'{count} times')}" for cause, count in found]
    if lost := lost_seconds(attempts):
        told.append(f"{lost / 3600:.2g} device-hours lost")
    return ", ".join(told)


def _is_news(attempt: Attempt, known: Mapping[float, Attempt]) -> bool:
    return attempt.began not in known or known[attempt.began].ended is None


class Attempts:
    """The attempts of all trials and the device-seconds they hold, kept up to date by one attempt at a time.

    A trial without attempts, of a simulation or an earlier version, counts with what it reported itself.
    """

    def __init__(self) -> None:
        self._of: dict[str, dict[float, Attempt]] = {}
        self._open: dict[tuple[str, float], Attempt] = {}
        self._ended: defaultdict[str, float] = defaultdict(float)
        self._reported: dict[str, float] = {}

    def add(self, key: str, attempt: Attempt) -> None:
        """Something is known of a trial's attempt."""
        known = self._of.setdefault(key, {})
        if not _is_news(attempt, known):
            return
        self._ended[""] -= self._reported.pop(key, 0.0)
        known[attempt.began] = attempt
        self._open[key, attempt.began] = attempt
        if attempt.ended is not None:
            del self._open[key, attempt.began]
            self._ended[_kind(attempt)] += attempt.device_seconds

    def report(self, key: str, device_seconds: float) -> None:
        """A trial says what it has held until now."""
        if key not in self._of:
            self._ended[""] += device_seconds - self._reported.get(key, 0.0)
            self._reported[key] = device_seconds

    def ended(self, manifest: Manifest, key: str | None = None) -> None:
        """What the account of an ended trial says."""
        for attempt in manifest.attempts:
            self.add(key or manifest.key, attempt)
        if (reported := manifest.cost.get("device_seconds")) is not None:
            self.report(key or manifest.key, reported)

    def all(self) -> list[list[Attempt]]:
        """Of each trial that has any, in order."""
        return [self.of(key) for key in self._of]

    def of(self, key: str) -> list[Attempt]:
        """A trial's attempts, in order."""
        return sorted(self._of.get(key, {}).values(), key=lambda attempt: attempt.began)

    def device_seconds(self, key: str, now: float) -> float | None:
        """What a trial has held until now; None where it has no attempts."""
        known = self._of.get(key)
        return None if known is None else sum(_seconds(attempt, now) for attempt in known.values())

    def held(self, now: float, device: str) -> dict[str, float]:
        """What all trials have held until now, by kind of device.

        Args:
            now: until when those that run count.
            device: kind of device of the trials that do not say.
        """
        held = self._ended.copy()
        for attempt in self._open.values():
            held[_kind(attempt)] += _seconds(attempt, now)
        reported = held.pop("", 0.0)
        if self._reported:
            held[device] += reported
        return dict(held)


def _kind(attempt: Attempt) -> str:
    return attempt.device.lower() or "cpu"


def _seconds(attempt: Attempt, now: float) -> float:
    """Device-seconds until now, where it has not ended."""
    return attempt.devices * max(0.0, now - attempt.began) if attempt.ended is None else attempt.device_seconds


def count_ended(attempts: Attempts, paths: StudyPaths, manifests: Sequence[Manifest]) -> None:
    """Enter what ended trials have held, and what those that were set aside had."""
    for manifest in manifests:
        attempts.ended(manifest)
    for path in below(paths.root, "set_aside/*/*/*/manifest.json"):
        if (aside := read_manifest(path)) is not None:
            attempts.ended(aside, str(path))


def read_attempts(
    paths: StudyPaths,
    records: Sequence[TrialRecord],
    manifests: Sequence[Manifest],
    sessions: Sequence[SessionRow] | None,
) -> Attempts:
    """What is recorded of all attempts; changes nothing.

    Args:
        paths: of the study.
        records: all trials of the ledger.
        manifests: all ended trials.
        sessions: of drivers, if none works on the study now, so that no attempt still runs.
    """
    attempts = Attempts()
    count_ended(attempts, paths, manifests)
    ended = {manifest.key for manifest in manifests}
    for record in records:
        if record.state == "waiting" or record.key in ended:
            continue
        events = list(read_events(paths.events(record.key)))
        for attempt in [*(unseen_ends(events, sessions) if sessions is not None else []), *attempts_of(events)]:
            attempts.add(record.key, attempt)
        attempts.report(record.key, max((event.metrics.get(COST, 0.0) for event in events), default=0.0))
    return attempts
