"""Trials that failed run again: from where they were, under their numbers, with all they held before."""

from __future__ import annotations

import time
from pathlib import Path

from study.config import StudyConfig
from study.ledger.ledger import Ledger, read_records
from study.ledger.set_aside import retry_failed, set_aside
from study.ledger.store import open_storage
from study.records import Event, TrialRecord, read_events
from tests.study.helpers import complete, opened, run_next, study
from trainables.config import TrialConfig
from trainables.results import Attempt, Cause, Outcome

LOST = Outcome(state="failed", reason="lost 3 times")


def attempted(ledger: Ledger, record: TrialRecord, began: float, cause: Cause) -> None:
    ended = Attempt(began=began, ended=began + 100, devices=2, device="l4", cause=cause)
    for one in (ended.model_copy(update={"ended": None, "cause": None}), ended):
        ledger.journal.log(record, Event(time=one.ended or one.began, event="attempt", attempt=one))


def failed_study(folder: Path) -> tuple[StudyConfig, Ledger]:
    """A recipe, a point and a searched trial that failed, and a recipe that diverged."""
    config = study(folder, trials=2, points=({"temperature": 0.05},))
    ledger = opened(config)
    for number, outcome in enumerate((LOST, Outcome(state="infeasible", reason="Diverged"), LOST, LOST)):
        record = ledger.take()
        for began in (1000, 2000, 3000):
            attempted(ledger, record, 10_000 * number + began, "infrastructure")
        (config.paths.runs / record.key).mkdir(parents=True)
        ledger.finish(record, outcome, TrialConfig())
    return config, ledger


def retried(config: StudyConfig) -> Ledger:
    retry_failed(config.paths, read_records("s", open_storage(config.paths, None)))
    return opened(config)


def test_failed_trials_go_on_where_they_were(tmp_path: Path) -> None:
    config, before = failed_study(tmp_path)
    assert before.remaining().resume == []
    ledger = retried(config)
    assert [r.state for r in ledger.records()] == ["running", "infeasible", "running", "running"]
    known = [(r.number, r.key, r.recipe, r.params) for r in before.records()]
    assert [(r.number, r.key, r.recipe, r.params) for r in ledger.records()] == known
    assert ledger.remaining().resume == [0, 2, 3]
    assert all((config.paths.runs / r.key).is_dir() for r in ledger.records()), "with their checkpoints"
    assert (config.paths.root / "set_aside" / "s-t00000-s0" / "1" / "manifest.json").exists()
    assert ledger.journal.held("cpu") == before.journal.held("cpu") == {"l4": 4 * 3 * 200}


def test_a_retried_trial_has_its_patience_anew_and_costs_everything(tmp_path: Path) -> None:
    config, _ = failed_study(tmp_path)
    ledger = retried(config)
    record = ledger.take(0)
    assert (len(ledger.journal.attempts(record)), ledger.journal.failures(record)) == (3, [])
    later = 2e9
    attempted(ledger, record, later, "infrastructure")
    attempted(ledger, record, later + 500, "preempted")
    again = opened(config)
    assert [one.began for one in again.journal.failures(record)] == [later]
    attempted(again, record, later + 1000, "complete")
    manifest = again.finish(record, complete(device_seconds=5), TrialConfig())
    assert manifest.cost["device_seconds"] == 6 * 200
    assert [one.cause for one in manifest.attempts][3:] == ["infrastructure", "preempted", "complete"]
    assert again.journal.held("cpu") == opened(config).journal.held("cpu") == {"l4": (4 * 3 + 3) * 200}
    assert [record.key for record in again.records() if record.state == "complete"] == [record.key]


def test_an_account_that_was_not_told_yet_is_retried_too(tmp_path: Path) -> None:
    config, _ = failed_study(tmp_path)
    with open_storage(config.paths, None).engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trials SET state = 'RUNNING' WHERE number IN (0, 1)")
    ledger = retried(config)
    assert ledger.records()[1].state == "infeasible", "it did not fail, so its account counts"
    assert ledger.remaining().resume == [0, 2, 3]
    assert ledger.journal.failures(ledger.records()[0]) == []


def test_twice_is_as_good_as_once_and_what_is_begun_anew_still_costs(tmp_path: Path) -> None:
    config, before = failed_study(tmp_path)
    retried(config)
    ledger = retried(config)
    assert ledger.journal.held("cpu") == before.journal.held("cpu")
    told = [event.message for event in read_events(config.paths.events("s-t00000-s0")) if event.event == "retry"]
    assert told == ["lost 3 times"]
    records = read_records("s", open_storage(config.paths, None))
    set_aside(config.paths, records, ["s-t00001-s0"])
    ledger = opened(config)
    assert ledger.journal.attempts(ledger.records()[1]) == []
    assert ledger.journal.held("cpu") == before.journal.held("cpu"), "device-hours are spent whatever became of them"


def test_a_result_made_from_a_model_that_was_replaced_meanwhile_does_not_count(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2)
    ledger = opened(config)
    outcomes = [complete(0.9, 0.2), complete(0.8, 0.3), complete(0.7, 0.4)]
    for outcome, base, protocol in zip(outcomes, "aba", "ppq", strict=True):
        assert outcome.result is not None
        outcome.result.hashes.update(data="d", base=base, substitutes="s", protocol=protocol)
    told = [run_next(ledger, config, outcome) for outcome in outcomes]
    assert [manifest.state for manifest in told] == ["complete", "failed", "complete"]
    assert told[1].reason is not None
    assert told[1].reason.startswith("base: replaced while the study ran")
    assert f"--rerun {told[1].key}" in told[1].reason
    assert told[1].metrics == {}


def test_what_a_trial_without_measurements_was_made_from_is_known_from_its_rungs(tmp_path: Path) -> None:
    config = study(tmp_path, trials=4)
    made = {"data": "d", "base": "a", "substitutes": "s"}
    ended = []
    for base, state in (("a", "stopped"), ("b", "stopped"), ("b", "infeasible"), ("b", "failed"), ("", "infeasible")):
        ledger = opened(config)
        record = ledger.take()
        if base:
            told = Event(time=time.time(), event="rung", step=2, hashes={**made, "base": base})
            ledger.journal.log(record, told)
            ledger = opened(config)  # a later session knows it from the log
        if state == "stopped":
            ended.append(ledger.stop(record, "is behind", TrialConfig()))
        else:
            ended.append(ledger.finish(record, Outcome(state=state, reason="why"), TrialConfig()))
    assert [manifest.state for manifest in ended] == ["stopped", "failed", "failed", "failed", "infeasible"]
    assert [manifest.hashes.get("base") for manifest in ended] == ["a", "b", "b", "b", None]
    reasons = ["is behind", "base: replaced", "base: replaced", "why", "why"]
    assert all(str(m.reason).startswith(reason) for m, reason in zip(ended, reasons, strict=True)), ended
