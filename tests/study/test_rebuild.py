"""A study's database is made again from its files, in whatever state it was, wherever it shall be."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from study import rebuild as command
from study.config import Budget, EarlyStopping, StudyConfig
from study.export import tables
from study.ledger import whereabouts
from study.ledger.frozen import load_frozen
from study.ledger.lease import Lease
from study.ledger.ledger import Ledger
from study.ledger.ownership import claim
from study.ledger.remake import FINGERPRINT, ID, MOVED, UNFINISHED
from study.ledger.sessions import sessions
from study.ledger.store import open_storage
from study.records import Event, read_frozen
from study.view import read_study
from tests.study.conftest import PASSWORD
from tests.study.helpers import complete, run_next, study
from trainables.config import TrialConfig
from trainables.errors import InputError
from trainables.results import Outcome

SAMPLERS = ("auto", "tpe", "random", "qmc", "nsga2")


def open_(config: StudyConfig) -> Ledger:
    config.paths.root.mkdir(parents=True, exist_ok=True)
    storage = open_storage(config.paths, config.storage)
    return Ledger(config, config.paths, claim(config, storage, {"mark": 1}, False), database=storage)


def lived(folder: Path, seed: int, trials: int = 12, **fields: Any) -> StudyConfig:
    """A study in the middle, with trials in every state, as the seed draws them."""
    draw = random.Random(seed)
    config = study(folder, budget=Budget(trials=trials), early_stopping=EarlyStopping(eta=2), seed=seed, **fields)
    ledger = open_(config)
    for _ in range(draw.randint(3, trials + 4)):
        record = ledger.take_next()
        if record is None:
            break
        ledger.journal.log(record, Event(time=1.0 + record.number, event="start", message="begun"))
        if draw.random() < 0.7:
            metrics = {"clean/mr_r1": draw.random(), "both/mr_r1": draw.random(), "cost/device_seconds": 1.0}
            ledger.journal.log(record, Event(time=2.0 + record.number, event="rung", step=5, metrics=metrics))
            ledger.rung(record, 5, 1, metrics)
        match draw.choice(["complete", "complete", "infeasible", "failed", "stopped", "running"]):
            case "complete":
                ledger.finish(record, complete(draw.random(), draw.random()), TrialConfig(key=record.key))
            case "infeasible":
                ledger.finish(record, Outcome(state="infeasible", reason="Diverged"), TrialConfig(key=record.key))
            case "failed":
                ledger.finish(record, Outcome(state="failed", reason="lost"), TrialConfig(key=record.key))
            case "stopped" if record.searched:
                ledger.stop(record, "is behind", TrialConfig(key=record.key))
    return config


def told(config: StudyConfig) -> list[dict[str, Any]]:
    """All of a database that is not the time of an end."""
    found = optuna.load_study(study_name=config.name, storage=open_storage(config.paths, config.storage))
    kept = ("number", "state", "params", "distributions", "values", "user_attrs", "system_attrs", "datetime_start")
    return [
        {"attributes": found._storage.get_study_system_attrs(found._study_id), "directions": found.directions},
        *({name: getattr(trial, name) for name in kept} for trial in found.trials),
    ]


def exported(config: StudyConfig) -> dict[str, str]:
    view = read_study(config.paths)
    return {name: table.to_csv() for name, table in tables(view).items()}


def rebuilt(config: StudyConfig, *flags: str) -> StudyConfig:
    assert command.main(["--name", config.name, "--studies-dir", str(config.studies_dir), *flags]) == 0
    return load_frozen(config.paths)


def next_points(config: StudyConfig) -> list[dict[str, Any]]:
    ledger = open_(config)
    return [record.params for _ in range(2) if (record := ledger.take_next()) is not None]


@pytest.mark.parametrize("seed", range(5))
def test_a_lost_database_is_made_again_as_it_was(tmp_path: Path, seed: int) -> None:
    points = ({"temperature": 0.05},) if seed % 2 else ()
    config = lived(tmp_path, seed, sampler=SAMPLERS[seed], points=points, replicates=seed % 3)
    before, shown = told(config), exported(config)
    kept = config.model_copy(update={"studies_dir": tmp_path / "kept"})
    shutil.copytree(config.paths.root, kept.paths.root)
    config.paths.database.unlink()
    with pytest.raises(InputError, match=r"python -m study.rebuild --name s --studies-dir"):
        open_(config)
    again = rebuilt(config)
    assert told(again) == before
    assert exported(again) == shown
    assert next_points(config) == next_points(kept)


def test_between_sqlite_and_postgresql_and_back(
    postgresql: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passwords = tmp_path / "pgpass"
    passwords.write_text(f"*:*:*:me:{PASSWORD}\n")
    passwords.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passwords))
    server = postgresql.replace(f":{PASSWORD}@", "@")
    config = lived(tmp_path, 3, replicates=1)
    with Lease(open_storage(config.paths, None).engine, "s", print) as lease:
        lease.use("worked before")
    before, shown, id_ = told(config), exported(config), read_frozen(config.paths).id
    with pytest.raises(InputError, match=r"--studies-dir .* --storage postgresql"):
        open_(config.model_copy(update={"storage": server}))
    there = rebuilt(config, "--storage", server)
    assert there.storage == server
    assert told(there) == before
    assert exported(there) == shown
    attributes = optuna.load_study(study_name="s", storage=server).user_attrs
    assert (attributes[ID], attributes[UNFINISHED], attributes.get(MOVED)) == (id_, False, None)
    assert attributes[FINGERPRINT] == read_frozen(config.paths).hash
    with pytest.raises(InputError, match=r"was moved from .*study.db to postgresql"):
        open_(config)
    assert rebuilt(config) == there
    assert "is all there: nothing to do" in capsys.readouterr().out

    ledger = open_(there)
    record = ledger.take()
    ledger.finish(record, complete(0.6, 0.6), TrialConfig(key=record.key))
    before, shown = told(there), exported(there)
    back = rebuilt(config, "--sqlite")
    assert back.storage is None
    assert told(back) == before
    assert exported(back) == shown
    with pytest.raises(InputError, match=r"was moved from postgresql.* to .*study.db"):
        open_(there)
    assert open_(back).records() == ledger.records()
    engines = [open_storage(config.paths, url).engine for url in (None, server)]
    for engine in engines:
        assert [row.device for row in sessions(engine, "s")].count("worked before") == 1, "its time goes with it, once"


def test_a_password_is_asked_for_and_kept_nowhere(
    postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = lived(tmp_path, 3, trials=4)
    flags = ["--name", config.name, "--studies-dir", str(config.studies_dir)]
    there = rebuilt(config, "--storage", postgresql)
    assert there.storage == postgresql.replace(f":{PASSWORD}@", "@")
    with pytest.raises(SystemExit, match="2"):
        command.main([*flags, "--sqlite"])
    assert "--lost if it is gone for good" in capsys.readouterr().err
    assert load_frozen(config.paths).storage == there.storage, "it was refused before anything changed"
    monkeypatch.setenv("PARETOVL_STORAGE", postgresql)
    assert read_study(config.paths).records
    assert rebuilt(config, "--sqlite").storage is None
    assert optuna.load_study(study_name="s", storage=postgresql).user_attrs[MOVED]
    monkeypatch.delenv("PARETOVL_STORAGE")
    assert PASSWORD not in config.paths.config.read_text()


def test_an_older_copy_is_refused_and_made_again(tmp_path: Path) -> None:
    config = lived(tmp_path, 5)
    shutil.copy(config.paths.database, tmp_path / "older.db")
    ledger = open_(config)
    record = ledger.take()
    before = told(config)
    shutil.copy(tmp_path / "older.db", config.paths.database)
    for use in (lambda: open_(config), lambda: read_study(config.paths)):
        with pytest.raises(
            InputError, match=rf"(?s){record.key}: the database knows no such trial.*study.rebuild --name"
        ):
            use()
    rebuilt(config)
    assert told(config) == before


def test_of_two_copies_of_a_folder_one_goes_on_in_a_database_and_a_moved_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = f"sqlite:///{tmp_path}/shared.db"
    first = lived(tmp_path / "one", 4)
    copy = first.model_copy(update={"studies_dir": tmp_path / "two"})
    shutil.copytree(first.paths.root, copy.paths.root)
    first = rebuilt(first, "--storage", shared)
    ledger = open_(first)
    run_next(ledger, first, complete(0.7, 0.7))
    before = told(first)

    flags = ["--name", "s", "--studies-dir", str(copy.studies_dir)]
    with pytest.raises(SystemExit, match="2"):
        command.main([*flags, "--storage", shared])
    said = capsys.readouterr().err
    assert f"was last worked on from {first.paths.root} on " in said
    assert f"study.rebuild --name s --studies-dir {copy.studies_dir} --storage {shared} --lost" in said
    assert told(first) == before
    moved = first.model_copy(update={"studies_dir": tmp_path / "three"})
    shutil.copytree(first.paths.root, tmp_path / "kept" / "s")
    first.studies_dir.rename(moved.studies_dir)
    assert open_(moved).records() == ledger.records(), "a folder may be moved"
    for use in (open_, lambda config: read_study(config.paths)):
        with pytest.raises(InputError, match=rf"last worked on from {moved.paths.root} on .* is a copy of that folder"):
            use(first.model_copy(update={"studies_dir": tmp_path / "kept"}))
    shutil.rmtree(moved.studies_dir)
    kept = rebuilt(first.model_copy(update={"studies_dir": tmp_path / "kept"}), "--lost")
    assert open_(kept).records() == ledger.records(), "the one that is left takes its place when it is told so"


def test_how_long_drivers_worked_is_read_from_the_logs_where_the_database_is_lost(tmp_path: Path) -> None:
    now = time.time()
    config = study(tmp_path)
    for began, at in ((now - 9000, (600, 1800)), (now - 4000, (100, 1200))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(whereabouts, "time", SimpleNamespace(time=lambda began=began: began))
            ledger = open_(config)
        for seconds in at:
            ledger.journal.log(ledger.records()[0], Event(time=began + seconds, event="start"))
    config.paths.database.unlink()
    for _ in range(2):
        rebuilt(config, "--lost")
        rows = sessions(open_storage(config.paths, None).engine, "s")
        worked = sorted((row.seconds() for row in rows), reverse=True)
        assert worked[:2] == pytest.approx([1800, 1200])
        assert sum(worked[2:]) < 100


def stopped_in_the_middle(config: StudyConfig) -> None:
    """After three trials."""
    made = optuna.storages.RDBStorage.create_new_trial
    calls = iter(range(99))

    def stopped(self: Any, *given: Any) -> int:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return made(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.storages.RDBStorage, "create_new_trial", stopped)
        with pytest.raises(KeyboardInterrupt):
            rebuilt(config)


def test_a_stop_in_the_middle_is_gone_on_with(tmp_path: Path) -> None:
    config = lived(tmp_path, 6)
    before = told(config)
    config.paths.database.unlink()
    stopped_in_the_middle(config)
    with pytest.raises(InputError, match="was being made from its files"):
        open_(config)
    rebuilt(config)
    assert told(config) == before


def test_a_trial_that_left_nothing_is_asked_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = lived(tmp_path, 7)
    numbers = [record.number for record in open_(config).records()]
    config.paths.database.unlink()
    shutil.rmtree(config.paths.root / "trials" / "s-t00001-s0")
    stopped_in_the_middle(config)
    rebuilt(config)
    assert "trial 1 left nothing on disk: it is asked anew" in capsys.readouterr().out
    again = open_(config).records()
    assert [record.number for record in again][: len(numbers)] == numbers
    assert again[1].state == "waiting"


def test_a_database_with_more_than_the_files_is_left_alone(tmp_path: Path) -> None:
    config = lived(tmp_path, 8)
    before = told(config)
    shutil.rmtree(config.paths.root / "trials")
    (config.paths.runs / "s-t00099-s0").mkdir(parents=True)
    with pytest.raises(SystemExit):
        rebuilt(config)
    assert told(config) == before


def test_running_trials_are_those_that_were_begun(tmp_path: Path) -> None:
    config = study(tmp_path, trials=4)
    ledger = open_(config)
    taken = [ledger.take() for _ in range(4)]
    one, two = (config.paths.asked(record.key) for record in taken[2:])
    text = one.read_text()
    one.write_text(two.read_text().replace(taken[3].key, taken[2].key).replace('"number": 3', '"number": 2'))
    with pytest.raises(InputError, match=r"t00002-s0/asked.json: is of another trial"):
        open_(config)
    one.write_text(text)
    assert open_(config).records() == ledger.records()
