"""A study as another process sees it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from study import export, status
from study.config import Budget, Price, StudyConfig
from study.ledger.lease import Lease
from study.ledger.ledger import Ledger
from study.ledger.store import open_storage
from study.ledger.trials import trial_of, trial_template
from study.records import Event, append_event
from study.view import read_study
from tests.study.helpers import complete, opened, run_next, study
from trainables.cli.command import read_config
from trainables.config import TrialConfig
from trainables.errors import InputError
from trainables.results import Attempt, Cause, Outcome


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    budget = Budget(trials=4, device_hours=1, money=10)
    return study(tmp_path, budget=budget, price=Price(device_hour={"l4": 36.0}, device="l4"))


def half_done(config: StudyConfig) -> None:
    """Two complete trials, one failed, one running, in a session that is over."""
    ledger = opened(config)
    with Lease(open_storage(config.paths, None).engine, "s", print):
        run_next(ledger, config, complete(0.9, 0.1, device_seconds=300))
        run_next(ledger, config, complete(0.4, 0.3, device_seconds=200))
        run_next(ledger, config, Outcome(state="failed", reason="lost"), held=100)
        going = ledger.take()
        append_event(config.paths.events(going.key), Event(time=time.time(), event="start", message="last"))
        time.sleep(0.01)


def arguments(config: StudyConfig, *more: str) -> list[str]:
    return ["--name", "s", "--studies-dir", str(config.studies_dir), *more]


def test_status_as_json(config: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    half_done(config)
    before = {path: path.stat().st_mtime_ns for path in config.paths.root.rglob("*")}
    assert status.main(arguments(config, "--json", "--events", "3")) == 0
    told = json.loads(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in config.paths.root.rglob("*")} == before, "it reads only"
    assert told["state"] == "interrupted"
    assert told["states"] == {"complete": 2, "failed": 1, "running": 1}
    assert told["trials"] == 6
    assert told["device_seconds"] == 600
    assert told["money"] == pytest.approx(6, abs=0.01)
    assert told["failures"] == [{"key": "s-t00002-s0", "state": "failed", "reason": "lost"}]
    assert told["resume"] == f"python -m study.run --name s --studies-dir {config.studies_dir}"
    assert [entry["key"] for entry in told["front"]] == ["s-t00000-s0", "s-t00001-s0"]
    assert 0 < told["hypervolume"] < 1
    limits = {limit["name"]: limit for limit in told["limits"]}
    assert limits["device_hours"]["spent"] == pytest.approx(1 / 6)
    assert limits["money"]["left"] == pytest.approx(4, abs=0.01)
    # Money is the nearest limit: 6 of 10 are spent, so two thirds of the time that was worked are left.
    assert told["remaining_seconds"] == pytest.approx(told["wall_seconds"] * 4 / 6, rel=0.01)
    assert [event["event"] for event in told["events"]] == ["start", "rung", "start"]
    assert told["events"][-1]["message"] == "last"


def test_status_for_people(config: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    half_done(config)
    assert status.main(arguments(config)) == 0
    shown = capsys.readouterr().out
    assert "study s is interrupted: 2 complete, 1 failed, 1 running, 6 planned" in shown
    assert ".900 [.890,.910]" in shown
    assert "6.00 USD" in shown
    assert f"to go on: python -m study.run --name s --studies-dir {config.studies_dir}" in shown
    assert "s-t00002-s0 failed: lost" in shown


def test_what_the_numbers_do_not_say(config: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = opened(config)
    for _ in range(2):
        run_next(ledger, config, complete(0.9, 0.1))
    words = "all 2 complete trials are equal in every objective, so nothing can be concluded"
    status.main(arguments(config))
    assert f"warning: {words}: clean/mr_r1 0.900" in " ".join(capsys.readouterr().out.split())
    status.main(arguments(config, "--json"))
    (caveat,) = json.loads(capsys.readouterr().out)["caveats"]
    assert caveat["text"].startswith(words)
    assert caveat["void"]


def tried(ledger: Ledger, key: str, *tries: tuple[float, float | None, Cause | None]) -> None:
    """Attempts on two devices, by seconds before now."""
    (record,) = [record for record in ledger.records() if record.key == key]
    for began, ended, cause in tries:
        end = None if ended is None else time.time() - ended
        attempt = Attempt(began=time.time() - began, ended=end, devices=2, device="L4", nodes=["a"], cause=cause)
        ledger.journal.log(record, Event(time=time.time(), event="attempt", attempt=attempt))


def test_what_waits_for_devices_and_what_was_lost(config: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    half_done(config)
    with Lease(open_storage(config.paths, None).engine, "s", lambda: None):
        ledger = opened(config)
        tried(ledger, "s-t00003-s0", (1800, 1440, "preempted"), (1080, 720, "preempted"))
        with open_storage(config.paths, None).engine.begin() as connection:
            connection.exec_driver_sql("UPDATE paretovl_sessions SET started = started - 3600")
        status.main(arguments(config))
        shown = capsys.readouterr().out
        told = "t00003 waiting for devices since 12 min (attempt 3; preempted twice, 0.4 device-hours lost)"
        assert told in shown
        assert "attempts: 2 preempted; 0.40 device-hours lost" in shown
        assert "preempted after 6 min at step 0" in shown
        assert f"to run those that failed again: {config.paths.retry_command}" in shown
        tried(ledger, "s-t00003-s0", (60, None, None))
        view = status.status_of(read_study(config.paths))
        assert view.waiting == []
        assert view.device_seconds == pytest.approx(500 + 100 + 1440 + 120, abs=50), "what runs counts until now"
    gone = status.status_of(read_study(config.paths))
    assert gone.waiting == []
    assert gone.device_seconds == pytest.approx(view.device_seconds, abs=5)


def test_a_study_is_running_while_its_driver_lives(config: StudyConfig) -> None:
    half_done(config)
    with Lease(open_storage(config.paths, None).engine, "s", print):
        assert status.status_of(read_study(config.paths)).state == "running"
    assert status.status_of(read_study(config.paths)).state == "interrupted"


def test_a_study_is_finished_by_the_limit_that_is_reached(config: StudyConfig) -> None:
    half_done(config)
    spent = config.model_copy(update={"budget": Budget(trials=4, device_hours=0.1)})
    ledger = opened(spent)
    assert status.status_of(read_study(config.paths)).ended_by is None, "a trial is still to be finished"
    going = next(record for record in ledger.records() if record.state == "running")
    ledger.finish(going, complete(), TrialConfig())
    ended = status.status_of(read_study(config.paths))
    assert ended.state == "finished"
    assert ended.resume is None
    assert ended.ended_by == "budget.device_hours: 0.1669 of 0.1 device-hours"


def test_a_study_that_was_only_begun(config: StudyConfig) -> None:
    opened(config)
    shutil.rmtree(config.paths.root / "trials")
    config.paths.database.unlink()
    told = status.status_of(read_study(config.paths))
    assert (told.state, told.states, told.front) == ("interrupted", {}, [])


def test_a_study_that_has_lost_its_database(config: StudyConfig) -> None:
    opened(config)
    config.paths.database.unlink()
    with pytest.raises(InputError, match=r"study\.rebuild --name"):
        read_study(config.paths)
    assert not config.paths.database.exists(), "who looks makes nothing"


def test_unknown_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        status.main(["--name", "none", "--studies-dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert "there is no study at" in capsys.readouterr().err


def test_attempts_are_a_table(config: StudyConfig, tmp_path: Path) -> None:
    half_done(config)
    ledger = opened(config)
    tried(ledger, "s-t00003-s0", (1800, 1440, "preempted"), (60, None, None))
    table = export.tables(read_study(config.paths))["attempts"]
    assert table["key"].tolist() == ["s-t00003-s0"] * 2
    assert table["attempt"].tolist() == [1, 2]
    assert table["cause"].tolist() == ["preempted", "interrupted"]
    assert table["nodes"].tolist() == ["a", "a"]
    assert table["device_seconds"].tolist() == pytest.approx([720, 120], abs=2)
    table.to_parquet(tmp_path / "attempts.parquet")


@pytest.mark.parametrize("kind", export.FORMATS)
def test_export(config: StudyConfig, kind: str, tmp_path: Path) -> None:
    half_done(config)
    assert export.main(arguments(config, "--format", kind, "--out", str(tmp_path / "out"))) == 0
    read = pd.read_csv if kind == "csv" else pd.read_parquet
    trials, tries, events = (read(tmp_path / "out" / f"{name}.{kind}") for name in ("trials", "attempts", "events"))
    assert trials["state"].tolist() == ["complete", "complete", "failed", "running"]
    assert trials["on_front"].tolist() == [True, True, False, False]
    assert trials["clean/mr_r1.low"][0] == pytest.approx(0.89)
    assert trials["cost/seconds/train"][1] == 200
    assert trials["param/temperature"].notna().tolist() == [True, False, True, True]
    assert trials["reason"][2] == "lost"
    rungs = events[events["name"] == "rung/cost/device_seconds"]
    assert rungs["value"].tolist() == [0.5, 0.5, 100]
    assert len(tries) == 0
    loss = events[(events["name"] == "train/loss") & (events["key"] == "s-t00001-s0")]
    assert (loss["value"].item(), loss["step"].item()) == (2.0, 1)
    assert events["message"].iloc[-1] == "last"


@pytest.mark.parametrize(("number", "of"), [(0, "a recipe"), (2, "a searched trial"), (3, "one that runs")])
def test_a_trial_as_a_configuration_is_the_trial(
    config: StudyConfig, number: int, of: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half_done(config)
    key = f"s-t{number:05d}-s0"
    assert export.main(arguments(config, "--trial", key, "--out", str(tmp_path / "out"))) == 0
    file = tmp_path / "out" / f"{key}.yaml"
    assert f"python -m trainables.trial {file}" in capsys.readouterr().out
    record = read_study(config.paths).records[number]
    trial = trial_of(config, trial_template(config), record)
    read = read_config(file)
    assert read == trial.model_copy(update={"storage_path": TrialConfig().storage_path}), of
    assert read.cache_dir.is_absolute()
    assert read.point.temperature == record.params.get("temperature", config.recipe_temperature)


def test_what_was_not_begun_cannot_be_exported(config: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    opened(config)
    with pytest.raises(SystemExit):
        export.main(arguments(config, "--trial", "s-t00000-s0"))
    assert "--trial s-t00000-s0: no trial of that key was begun; trials are none yet" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "export", "track"])
def test_help_comes_at_once(command: str) -> None:
    seconds = []
    for _ in range(2):
        began = os.times()
        done = subprocess.run(
            [sys.executable, "-m", f"study.{command}", "--help"], capture_output=True, text=True, check=True
        )
        ended = os.times()
        seconds.append(sum(ended[2:4]) - sum(began[2:4]))
    assert "--studies-dir" in done.stdout
    assert min(seconds) < 1


def test_a_study_is_told_under_an_ascii_locale(config: StudyConfig) -> None:
    ledger = opened(config)
    run_next(ledger, config, Outcome(state="failed", reason="café 犬"))
    going = ledger.take()
    append_event(config.paths.events(going.key), Event(time=time.time(), event="start", message="naïve"))
    ascii_locale = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    told = subprocess.run(
        [sys.executable, "-m", "study.status", *arguments(config)], env=ascii_locale, capture_output=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert b"na\\xefve" in told.stdout
