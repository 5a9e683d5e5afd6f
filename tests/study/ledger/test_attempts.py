"""What trials have held, by their attempts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from study.ledger.attempts import Attempts, attempts_of, failures, in_words, lost_seconds, troubles, unseen_ends
from study.ledger.sessions import SESSIONS, SessionRow, make_sessions_table
from study.ledger.store import open_storage
from study.records import Event, read_events
from tests.study.helpers import complete, opened, study
from trainables.config import TrialConfig
from trainables.results import Attempt, Cause, Outcome


def attempt(began: float, ended: float | None = None, cause: Cause | None = None, **fields: Any) -> Attempt:
    return Attempt(began=began, ended=ended, cause=cause, **{"devices": 2.0, "device": "L4", **fields})


def told(attempt: Attempt, time: float | None = None) -> Event:
    return Event(time=time or attempt.ended or attempt.began, event="attempt", attempt=attempt)


def session(started: float, heartbeat: float) -> SessionRow:
    return SessionRow(1, "s", "host", 1, 0.0, "", started, heartbeat, None)


def test_an_attempt_is_what_was_first_said_of_its_end() -> None:
    first, second = attempt(10, 20, "preempted"), attempt(30)
    events = [told(attempt(10)), told(first), told(second), told(attempt(10, 99, "bug")), told(attempt(10))]
    assert attempts_of(events) == [first, second]
    assert attempts_of([]) == []


def test_an_end_that_nobody_saw_is_the_last_sign_of_its_driver() -> None:
    rung = Event(time=46, event="rung", step=14)
    sessions = [session(0, 45), session(100, 160)]
    (closed,) = unseen_ends([told(attempt(10, 20, "bug")), told(attempt(30, from_step=7))], sessions)
    assert (closed.began, closed.ended, closed.cause, closed.to_step) == (30, 45, "interrupted", 7)
    (closed,) = unseen_ends([told(attempt(30, from_step=7)), rung], sessions)
    assert (closed.ended, closed.from_step, closed.to_step) == (46, 7, 14), "something of it was logged after the beat"
    (closed,) = unseen_ends([told(attempt(30)), Event(time=45, event="resume", step=7), rung], sessions)
    assert (closed.from_step, closed.to_step) == (7, 14), "what it went on from was known later"
    (closed,) = unseen_ends([told(attempt(30))], [])
    assert closed.ended == 30, "no session is known"


def test_what_counts_as_failure() -> None:
    causes: list[Cause] = ["infrastructure", "preempted", "queued", "interrupted", "bug", "infrastructure"]
    tries = [attempt(10 * n, 10 * n + 5, cause) for n, cause in enumerate(causes)]
    assert failures(tries) == [tries[0], *tries[4:]]
    assert failures(tries, since=40) == tries[4:]


def test_what_was_lost() -> None:
    silent = [attempt(100 * n, 100 * n + 50, "infrastructure") for n in range(3)]
    assert lost_seconds(silent) == 300, "three times nothing"
    half = [attempt(0, 100, "preempted", to_step=40), attempt(200, 300, "complete", from_step=30, to_step=100)]
    assert lost_seconds(half) == 50
    unseen = [attempt(0, 100, "preempted"), attempt(200, 300, "complete", from_step=30)]
    assert lost_seconds(unseen) == 0, "it had come further than was reported"
    assert lost_seconds([attempt(0, 100, "queued"), attempt(100)]) == lost_seconds([]) == 0


def test_totals_are_kept_by_one_attempt_at_a_time() -> None:
    attempts = Attempts()
    attempts.report("old", 40)
    attempts.report("old", 70)
    attempts.report("new", 10)
    assert attempts.held(0, "cpu") == {"cpu": 80}
    for one in (attempt(10), attempt(10, 20, "preempted"), attempt(10, 99, "bug"), attempt(30, device="")):
        attempts.add("new", one)
    attempts.report("new", 1000)
    assert attempts.held(40, "cpu") == {"cpu": 70 + 20, "l4": 20}, "its attempts say more than it reported"
    assert (attempts.device_seconds("new", 40), attempts.device_seconds("old", 40)) == (40, None)


def test_a_kind_is_known_as_soon_as_it_is_held() -> None:
    attempts = Attempts()
    attempts.report("a", 0.1)
    attempts.report("b", 0.2)
    attempts.add("a", attempt(5, device="H100"))
    attempts.add("b", attempt(5, device="H100"))
    assert attempts.held(5, "cpu") == {"h100": 0}, "and nothing is left of what was only reported"


def test_what_went_wrong_in_words() -> None:
    causes: list[Cause] = ["preempted", "queued", "preempted", "infrastructure"]
    tries = [attempt(1000 * n, 1000 * n + 360, cause) for n, cause in enumerate(causes)]
    assert troubles(tries) == "preempted twice, queued once, infrastructure once, 0.6 device-hours lost"
    assert troubles([attempt(0, 9, "complete")]) == ""
    ended = attempt(0, 700, "out_of_memory", to_step=40, reason="rank 1")
    assert in_words(ended) == "out of memory after 12 min at step 40: rank 1"
    assert in_words(attempt(0, nodes=["a b1", "c d2"])) == "holds 2 L4 on a b1, c d2"


def test_silent_half_hours_cost_what_they_held(tmp_path: Path) -> None:
    config = study(tmp_path, trials=1, recipes=())
    ledger = opened(config)
    record = ledger.take()
    for start in (0, 2000, 4000):
        ledger.journal.log(record, told(attempt(start)))
        ledger.journal.log(record, told(attempt(start, start + 1800, "infrastructure")))
    manifest = ledger.finish(record, Outcome(state="failed", reason="silent"), TrialConfig())
    assert manifest.cost == {"device_seconds": 3 * 1800 * 2}
    assert [one.cause for one in manifest.attempts] == ["infrastructure"] * 3
    assert ledger.journal.held("cpu") == opened(config).journal.held("cpu") == {"l4": 3 * 1800 * 2}


def test_a_complete_trial_costs_all_its_attempts_and_is_told_so(tmp_path: Path) -> None:
    objectives = [
        {"metric": "clean/mr_r1"},
        {"metric": "cost/device_seconds", "direction": "minimize", "low": 0, "high": 900},
    ]
    config = study(
        tmp_path,
        trials=1,
        recipes=(),
        objectives=objectives,
        constraints=({"metric": "cost/device_seconds", "at_most": 300},),
    )
    ledger = opened(config)
    record = ledger.take()
    for one in (attempt(0, 100, "preempted"), attempt(200, 290, "complete")):
        ledger.journal.log(record, told(one.model_copy(update={"ended": None, "cause": None})))
        ledger.journal.log(record, told(one))
    manifest = ledger.finish(record, complete(device_seconds=90), TrialConfig())
    assert (manifest.state, manifest.reason) == ("infeasible", "does not keep cost/device_seconds <= 300")
    (stored,) = open_storage(config.paths, None).get_all_trials(1)
    assert stored.values == [0.5, 380]


def test_the_next_driver_closes_what_the_last_one_left(tmp_path: Path) -> None:
    config = study(tmp_path, trials=1, recipes=())
    ledger = opened(config)
    record = ledger.take()
    engine = open_storage(config.paths, None).engine
    make_sessions_table(engine)
    row = {"study": "s", "host": "h", "process": 1, "process_started": 0, "device": "", "started": 5, "heartbeat": 70}
    with engine.begin() as connection:
        connection.execute(SESSIONS.insert().values(**row, ended=70))
    ledger.journal.log(record, told(attempt(10)))
    again = opened(config)
    (closed,) = again.journal.attempts(record)
    assert (closed.ended, closed.cause) == (70, "interrupted")
    assert again.journal.device_seconds(record) == 120
    assert opened(config).journal.attempts(record) == [closed]
    log = [event for event in read_events(config.paths.events(record.key)) if event.event == "attempt"]
    assert len(log) == 2, "it is written once"


def test_a_step_is_logged_once(tmp_path: Path) -> None:
    config = study(tmp_path, trials=3, recipes=())
    ledger = opened(config)
    record = ledger.take()
    values = {"clean/mr_r1": 0.5, "both/mr_r1": 0.1}
    assert not ledger.journal.logged(record, 7)
    ledger.rung(record, 7, 1, values)
    assert not ledger.journal.logged(record, 7), "a driver that is killed now has not logged it"
    ledger.journal.log(record, Event(time=1, event="rung", step=7, metrics=values, message="stopped at step 7"))
    for one in (ledger, opened(config)):
        assert one.journal.logged(record, 7)
        assert not one.journal.logged(record, 14)
        assert one.rung(record, 7, 1, {"clean/mr_r1": 0.9}) == "stopped at step 7", "judged once"
    assert one.stop(record, "why", TrialConfig()).rungs == {7: values}


@pytest.mark.parametrize("cause", ["queued", "preempted"])
def test_waiting_holds_nothing(cause: Cause) -> None:
    assert attempt(0, 600, cause).device_seconds == (0 if cause == "queued" else 1200)
