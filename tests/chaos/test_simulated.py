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
from pathlib import Path
from typing import Any

import pytest

from study.config import StudyConfig
from study.ledger import read_records
from study.mlflow_store import ExperimentStore
from study.store import open_storage
from study.tracking import Projection
from tests.chaos.simulated import Account, drive, simulated_study

pytestmark = pytest.mark.chaos


def undisturbed(folder: Path, trials: int) -> tuple[StudyConfig, Account]:
    config = simulated_study(folder / "undisturbed", trials)
    drive(config, 0, False)
    return config, Account.of(config)


def test_killed_at_random_points(tmp_path: Path, long_chaos: bool) -> None:
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
    print(
        f"\nkilled {killed['kills']} times: {len(numbers)} trials of {trials + 2}, "
        f"lost {trials + 2 - len(set(numbers))}, doubled {len(numbers) - len(set(numbers))}, "
        f"front {len(killed['front'])}, {len(killed['runs'])} MLflow runs, {killed['seconds']} s "
        f"({whole['seconds']} s undisturbed)"
    )
    assert killed["kills"] >= kills
    assert numbers == list(range(trials + 2))
    assert {state for _, state, *_ in killed["trials"]} == {"COMPLETE", "PRUNED"}
    for store in ("trials", "manifests", "front", "runs"):
        assert killed[store] == whole[store], store
    if long_chaos:
        assert len({name for name, *_ in killed["runs"]}) == len(killed["runs"]) == trials + 3


def test_a_locked_database_is_waited_for(tmp_path: Path) -> None:
    whole, account = undisturbed(tmp_path, 4)
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
    assert found.trials == account.trials
    assert found.manifests == account.manifests
    assert whole.paths.front.read_text() == config.paths.front.read_text()


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
def test_a_full_disk_loses_nothing(tmp_path: Path, room: int) -> None:
    """Every file may only grow to so many bytes, as on a full disk; then there is room again."""
    _, account = undisturbed(tmp_path, 6)
    config = simulated_study(tmp_path / "full", 6)
    assert child(config, largest_file=room) != 0
    for path in config.paths.root.glob("trials/*/manifest.json"):
        json.loads(path.read_text())  # whole or not at all
    assert child(config, largest_file=None) == 0
    found = Account.of(config)
    assert found.trials == account.trials
    assert found.manifests == account.manifests
    assert found.front == account.front


def test_mlflow_away_is_caught_up_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert len(late.runs) == 6
    assert late.trials == undisturbed(tmp_path, 3)[1].trials

    # Rebuilt from nothing it is the same.
    rebuilt = Projection(config.paths, None, config.name, config.objectives, replace=True)
    rebuilt.sync(read_records(config.name, open_storage(config.paths, None)), "finished")
    assert Account.of(config).runs == late.runs
