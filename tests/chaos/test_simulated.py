"""Drivers killed at random points, locked databases, full disks, MLflow away: the study ends as if undisturbed."""

from __future__ import annotations

import errno
import json
import os
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from study.config import StudyConfig
from study.ledger.ledger import read_records
from study.ledger.store import open_storage
from study.tracking.mlflow_store import ExperimentStore
from study.tracking.projection import Projection
from tests.chaos.simulated import Account, drive, simulated_study
from tests.chaos.table import Tell

pytestmark = pytest.mark.chaos


def undisturbed(folder: Path, trials: int) -> tuple[StudyConfig, Account]:
    config = simulated_study(folder / "undisturbed", trials)
    drive(config, 0, False)
    return config, Account.of(config)


def entries(account: dict[str, Any]) -> list[object]:
    """Every trial by its number, and every MLflow run by its name."""
    return [number for number, *_ in account["trials"]] + [name for name, *_ in account["runs"]]


def test_killed_at_random_points(tmp_path: Path, long_chaos: bool, tell: Tell) -> None:
    kills, trials = (120, 150) if long_chaos else (12, 24)
    flags = ["--kills", str(kills), "--trials", str(trials), "--seed", "1", *(["--mlflow"] if long_chaos else [])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.simulated", str(tmp_path), *flags],
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800 if long_chaos else 300,
        check=True,
    )
    accounts: dict[str, dict[str, Any]] = json.loads(done.stdout)
    killed, whole = accounts["killed"], accounts["undisturbed"]
    numbers = [number for number, *_ in killed["trials"]]
    stores = ("trials", "manifests", "front", "runs")
    equal = all(killed[store] == whole[store] for store in stores)
    tell("driver of a simulated study killed", killed["kills"], entries(killed), entries(whole), equal)
    assert killed["kills"] >= kills
    assert numbers == list(range(trials + 2))
    assert {state for _, state, *_ in killed["trials"]} == {"COMPLETE", "PRUNED"}
    for store in stores:
        assert killed[store] == whole[store], store
    if long_chaos:
        assert len({name for name, *_ in killed["runs"]}) == len(killed["runs"]) == trials + 3


def test_a_locked_database_is_waited_for(tmp_path: Path, tell: Tell) -> None:
    _, account = undisturbed(tmp_path, 4)
    config = simulated_study(tmp_path / "locked", 4)
    driver = threading.Thread(target=drive, args=(config, 0.02, False))
    driver.start()
    locked = 0
    while driver.is_alive():
        if config.paths.database.exists():
            with sqlite3.connect(config.paths.database, timeout=5) as connection:
                connection.execute("BEGIN EXCLUSIVE")
                time.sleep(0.3)
                locked += 1
            connection.close()
        time.sleep(0.05)
    driver.join()
    assert locked > 2
    found = Account.of(config)
    tell("SQLite locked for 0.3 s", locked, entries(asdict(found)), entries(asdict(account)), found == account)
    assert found == account


def child(config: StudyConfig, largest_file: int | None) -> int:
    """Exit code of a driver that may write files up to so many bytes; -1 if it raised."""
    process = os.fork()
    if process == 0:
        code = 255
        try:
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            drive(config, 0, False)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("room", [0, 700, 3_000, 200_000])
def test_a_full_disk_loses_nothing(tmp_path: Path, room: int, tell: Tell) -> None:
    """Every file may only grow to so many bytes, as on a full disk; then there is room again."""
    _, account = undisturbed(tmp_path, 6)
    config = simulated_study(tmp_path / "full", 6)
    assert child(config, largest_file=room) != 0
    for path in config.paths.root.glob("trials/*/manifest.json"):
        json.loads(path.read_text())  # whole or not at all
    assert child(config, largest_file=None) == 0
    found = Account.of(config)
    tell(f"disk full after {room} bytes a file", 1, entries(asdict(found)), entries(asdict(account)), found == account)
    assert found == account


def test_mlflow_away_is_caught_up_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Tell) -> None:
    config = simulated_study(tmp_path / "away", 3)
    with monkeypatch.context() as patch:

        def down(*_: object) -> None:
            raise OSError(errno.ECONNREFUSED, "down")

        patch.setattr(ExperimentStore, "bring", down)
        with pytest.raises(Exception, match="Nothing is lost"):
            drive(config, 0, True)
    assert [state for _, state, *_ in Account.of(config).trials].count("RUNNING") == 0
    drive(config, 0, True)
    late = Account.of(config)
    whole = simulated_study(tmp_path / "undisturbed", 3)
    drive(whole, 0, True)
    account = Account.of(whole)
    tell("MLflow down until the end", 1, entries(asdict(late)), entries(asdict(account)), late == account)
    assert len(late.runs) == 6
    assert late == account

    # Rebuilt from nothing it is the same.
    rebuilt = Projection(config.paths, None, config.name, config.objectives, replace=True)
    rebuilt.sync(read_records(config.name, open_storage(config.paths, None)), "finished")
    assert Account.of(config).runs == late.runs
