"""`python -m study.status`: how a study stands, from any shell, while it runs and afterwards. Changes nothing."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from search_spaces.notation import duration
from study.costs.budget import Limit, device_kind, ended_by, known_money, limits, remaining_seconds, usage
from study.ledger.attempts import Attempts, causes, lost_seconds, message_of, read_attempts, troubles
from study.paths import StudyPaths, short_key
from study.records import read_events
from study.view import StudyView, read_study, study_parser
from trainables.cli.command import exit_on_input_error
from trainables.config import Model
from trainables.errors import InputError, counted
from trainables.results import Caveat

if TYPE_CHECKING:
    from rich.console import Group


class LimitStatus(Model):
    """A limit of the budget."""

    name: str
    spent: float
    limit: float
    left: float
    unit: str


class EventStatus(Model):
    """Something that happened to a trial."""

    time: float
    key: str
    event: str
    step: int
    message: str


class FailureStatus(Model):
    """A trial that did not work, and why."""

    key: str
    state: str
    reason: str


class WaitingStatus(Model):
    """A trial that will be tried again as soon as there are devices."""

    key: str
    since: float
    attempt: int
    troubles: str


class Status(Model):
    """How a study stands; what `--json` prints."""

    name: str
    state: str
    """running: a driver works on it. finished: the budget is spent. interrupted: the same command goes on."""
    ended_by: str | None
    trials: int
    states: dict[str, int]
    front: list[dict[str, Any]]
    hypervolume: float
    caveats: list[Caveat]
    limits: list[LimitStatus]
    wall_seconds: float
    device_seconds: float
    device: str
    money: float | None
    currency: str
    remaining_seconds: float | None
    sessions: int
    failures: list[FailureStatus]
    waiting: list[WaitingStatus]
    attempts: dict[str, int]
    """By cause of their end."""
    lost_device_seconds: float
    """Held for what had to be done again."""
    retry: str | None
    """What to type to run the failed trials again; None where there are none."""
    resume: str | None
    """What to type to go on; None where nothing is left to do."""
    events: list[EventStatus]

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.ended_by is not None


def status_of(view: StudyView, shown_events: int = 8) -> Status:
    """Everything about a study, from what is recorded of it."""
    from study.front.caveats import study_caveats
    from study.front.estimates import front
    from study.front.hypervolume import History

    config, now = view.config, time.time()
    wall = sum(row.seconds(now if view.running else None) for row in view.sessions)
    history = History(config.objectives, view.manifests)
    kinds = [row.device for row in view.sessions if row.device]
    device = device_kind(config.price, kinds[-1:])
    attempts = read_attempts(view.paths, view.records, view.manifests, None if view.running else view.sessions)
    held = attempts.held(now, device)
    used = usage(config.budget, view.records, view.manifests, history.shares, held, wall)
    found = limits(config.budget, config.price, used)
    by = ended_by(found, view.records)
    entries = front(view.manifests, config.objectives, config.protocol.confidence)
    tries = attempts.all()
    return Status(
        name=config.name,
        state="running" if view.running else "finished" if by else "interrupted",
        ended_by=str(by) if by else None,
        trials=used.planned_trials,
        states=dict(Counter(record.state for record in view.records)),
        front=[entry.model_dump(mode="json") for entry in entries],
        hypervolume=history.rows[-1][-1] if history.rows else 0.0,
        caveats=study_caveats(view.manifests, entries, config.objectives, config.protocol),
        limits=[_limit(limit) for limit in found],
        wall_seconds=wall,
        device_seconds=used.device_seconds,
        device=device,
        money=known_money(config.price, held, wall),
        currency=config.price.currency,
        remaining_seconds=None if by else remaining_seconds(found, wall),
        sessions=len(view.sessions),
        failures=[
            FailureStatus(key=manifest.key, state=manifest.state, reason=manifest.reason or "")
            for manifest in view.manifests
            if manifest.state in ("infeasible", "failed")
        ],
        waiting=_waiting(view, attempts) if view.running else [],
        attempts=causes(attempt for each in tries for attempt in each),
        lost_device_seconds=sum(map(lost_seconds, tries)),
        retry=view.paths.retry_command if any(m.state == "failed" for m in view.manifests) else None,
        resume=None if by or view.running else view.paths.resume_command,
        events=_last_events(view, shown_events),
    )


def _limit(limit: Limit) -> LimitStatus:
    return LimitStatus(name=limit.name, spent=limit.spent, limit=limit.limit, left=limit.left, unit=limit.unit)


def _waiting(view: StudyView, attempts: Attempts) -> list[WaitingStatus]:
    """Trials of a study that runs, which hold no devices."""
    ended, begun = {manifest.key for manifest in view.manifests}, view.sessions[-1].started if view.sessions else 0.0
    found = []
    for record in view.records:
        tries = attempts.of(record.key)
        if record.state == "running" and record.key not in ended and all(one.ended is not None for one in tries):
            since = max([begun, *(one.ended or 0.0 for one in tries)])
            found.append(WaitingStatus(key=record.key, since=since, attempt=len(tries) + 1, troubles=troubles(tries)))
    return found


def _last_events(view: StudyView, count: int) -> list[EventStatus]:
    happened = [
        EventStatus(time=event.time, key=record.key, event=event.event, step=event.step, message=message_of(event))
        for record in view.records
        for event in read_events(view.paths.events(record.key))
    ]
    return sorted(happened, key=lambda event: event.time)[-count:]


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    examples = "python -m study.status --name quickstart", "python -m study.status --json --events 0"
    parser = study_parser("python -m study.status", __doc__, *examples)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--events", type=int, metavar="N", default=8, help="how many of the last events (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parser().parse_args(arguments)
    with exit_on_input_error():
        if options.events < 0:
            raise InputError(f"--events: {options.events} is negative; 0 shows none")
        view = read_study(StudyPaths(options.studies_dir / options.name))
        status = status_of(view, options.events)
        if options.json:
            print(status.model_dump_json(indent=1))
        else:
            _print(status, view)
    return 0


def _print(status: Status, view: StudyView) -> None:
    from study.execution.display import terminal

    console = terminal()
    console.print(page(status, view))


def page(status: Status, view: StudyView) -> Group:
    """What a person reads."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from study.execution.display import front_table
    from study.front.estimates import front

    states = ", ".join(f"{count} {state}" for state, count in sorted(status.states.items())) or "none yet"
    lines = [f"study {status.name} is {status.state}: {states}, {status.trials} planned"]
    lines += [f"ended by {status.ended_by}"] if status.ended_by else []
    lines += [f"hypervolume {status.hypervolume:.3g}, {len(status.front)} on the front"]
    held = f"{status.device_seconds / 3600:.2f} device-hours ({status.device})"
    paid = f", {status.money:.2f} {status.currency}" if status.money is not None else ""
    lines += [f"{duration(status.wall_seconds)} in {counted(status.sessions, 'session')}, {held}{paid}"]
    if status.remaining_seconds is not None:
        lines += [f"about {duration(status.remaining_seconds)} left"]
    if status.resume is not None:
        lines += [f"to go on: {status.resume}"]
    if status.attempts.keys() - {"complete", "stopped"}:
        causes = ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in sorted(status.attempts.items()))
        lines += [f"attempts: {causes}; {status.lost_device_seconds / 3600:.2f} device-hours lost"]
    for trial in status.waiting:
        tries = "; ".join(filter(None, [f"attempt {trial.attempt}", trial.troubles]))
        lines += [f"{short_key(trial.key)} waiting for devices since {duration(time.time() - trial.since)} ({tries})"]
    lines += [f"{failure.key} {failure.state}: {failure.reason}" for failure in status.failures]
    lines += [f"to run those that failed again: {status.retry}"] if status.retry else []
    lines += [f"warning: {caveat.text}" for caveat in status.caveats]
    budget = Table(box=None, pad_edge=False)
    for name in ("budget", "spent", "left", "of", ""):
        budget.add_column(name, justify="left" if name in ("budget", "") else "right")
    for limit in status.limits:
        numbers = (f"{value:.4g}" for value in (limit.spent, limit.left, limit.limit))
        budget.add_row(limit.name, *numbers, limit.unit)
    log = Table(box=None, pad_edge=False, show_header=False)
    for event in status.events:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(event.time))
        log.add_row(when, Text(event.key), event.event, f"step {event.step}", Text(event.message))
    objectives = view.config.objectives
    confidence = view.config.protocol.confidence
    entries = front(view.manifests, objectives, confidence)
    table = front_table(entries, view.manifests, objectives, confidence)
    return Group(*(Text(line) for line in lines), Text(), budget, Text(), *((table, Text()) if entries else ()), log)


if __name__ == "__main__":
    sys.exit(main())
