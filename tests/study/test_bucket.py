"""Studies with Ray whose folder is a bucket and whose ledger is a server: killed, asleep, and with the server away."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import yaml

from study.paths import StudyPaths
from study.records import read_events
from tests.study.conftest import Server
from trainables.files import Location, UrlPath, below

CONFIG: dict[str, Any] = {
    "name": "s",
    "recipes": ["mat"],
    "objectives": [{"metric": "clean/mr_r5"}, {"metric": "both/mr_r5"}],
    "cluster": {"concurrency": 1},
    "data": {"image_pixels": 32, "shapes": {"train_images": 64, "val_images": 16, "test_images": 16}},
    "trial": {
        "model": {
            "tiny": {"width": 32, "layers": 1, "heads": 2, "patch_pixels": 8, "embedding": 32},
            "pretrain": {"epochs": 1, "batch_size": 16, "mlm_epochs": 1},
        },
        "training": {"epochs": 3, "batch_size": 8},
    },
    "early_stopping": {"enabled": False},
    "protocol": {"gallery_images": 12, "rung_gallery_images": 6, "image_steps": 1, "bootstrap_samples": 100},
}
WAIT_SECONDS = 400

pytestmark = pytest.mark.chaos


class Study:
    """`python -m study.run` and its kin on one study."""

    def __init__(self, folder: Path, studies: Location, trials: int, *flags: str) -> None:
        self._config, self.paths = folder / "config.yaml", StudyPaths(studies / "s")
        self._where = ["--name", "s", "--studies-dir", str(studies)]
        self._trials = trials
        self._flags = ["--config", str(self._config), "--cache-dir", str(folder / "cache"), *flags]
        self._flags += ["--budget.trials", str(trials)]
        self._config.write_text(yaml.safe_dump(CONFIG))

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "study.run", *self._where, *self._flags]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/")

    def finish(self) -> str:
        process = self.start()
        output, _ = process.communicate(timeout=WAIT_SECONDS)
        assert f"study s is done: {self._trials + 1} trial" in output, output  # or trials
        return output

    def in_a_trial(self) -> subprocess.Popen[str]:
        """A driver whose first trial has a checkpoint and has not ended."""
        process, end = self.start(), time.time() + WAIT_SECONDS
        while not any(event.event == "rung" for path in self.logs() for event in read_events(path)):
            assert process.poll() is None, process.communicate()[0]
            assert time.time() < end, "waited too long"
            time.sleep(0.05)
        return process

    def kill_in_a_trial(self) -> None:
        process = self.in_a_trial()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)

    def logs(self) -> list[Location]:
        return below(self.paths.root, "trials/*/events.jsonl")

    def command(self, name: str, *flags: str) -> str:
        command = [sys.executable, "-m", f"study.{name}", *self._where, *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False, cwd="/")
        assert done.returncode in (0, 1), done.stderr
        return done.stdout


def measured(study: Study, to: Path) -> dict[str, pd.DataFrame]:
    """Both tables of an export, without what the clock says."""
    study.command("export", "--out", str(to))
    tables = {name: pd.read_csv(to / f"{name}.csv") for name in ("trials", "events")}
    trials, events = tables["trials"], tables["events"]
    clock = ("ended", "cost/", "attempts", "lost")
    repeated = events["event"].isin(["start", "resume", "attempt", "end"]) | events["name"].str.startswith(
        ("train/time", "cost/", "rung/cost/"), na=False
    )
    events = events[~repeated].drop(columns=["time", "message"])
    return {
        "trials": trials[[name for name in trials if not name.startswith(clock)]],
        "events": events.drop_duplicates(["key", "event", "step", "name"]).reset_index(drop=True),
    }


@pytest.fixture(autouse=True)
def in_full(long_chaos: bool) -> None:
    if not long_chaos:  # minutes each: a lease has to expire, a server to be away for long
        pytest.skip("sessions of Ray; test_urls.py, test_outages.py and test_fence.py have short forms without Ray")


@pytest.mark.timeout(4 * WAIT_SECONDS)
def test_killed_and_gone_on_with_in_a_bucket(bucket: UrlPath, postgresql_of_file: str, tmp_path: Path) -> None:
    trials = 0
    disk = Study(tmp_path, tmp_path / "studies", trials)
    disk.finish()
    elsewhere = ("--storage", postgresql_of_file, "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
    remote = Study(tmp_path, bucket / "studies", trials, *elsewhere)
    remote.kill_in_a_trial()
    output = remote.finish()
    assert "study s goes on with what it was begun with" in output

    one, other = measured(disk, tmp_path / "one"), measured(remote, tmp_path / "other")
    for name in ("trials", "events"):
        pd.testing.assert_frame_equal(one[name], other[name])
    events = [event for path in remote.logs() for event in read_events(path)]
    assert any(event.event == "resume" and event.step for event in events), "it went on from a checkpoint"
    fronts = [json.loads(study.paths.front.read_text(encoding="utf-8")) for study in (disk, remote)]
    assert fronts[0] == fronts[1]
    assert [path.name for path in (tmp_path / "studies").iterdir()] == ["s"], "nothing of the other lies on this disk"
    assert weights(disk) == weights(remote)


def weights(study: Study) -> bytes:
    """Of the model that is left of the first trial."""
    (found,) = below(study.paths.runs / "s-t00000-s0", "**/model.safetensors")
    return found.read_bytes()


def complete_once(study: Study, url: str) -> None:
    """Every trial of the database, once, with its account."""
    storage = optuna.storages.RDBStorage(url)
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * len(trials)
    storage.engine.dispose()
    accounts = below(study.paths.root, "trials/*/manifest.json")
    assert sorted(path.parent.name for path in accounts) == [f"s-t{trial.number:05d}-s0" for trial in trials]


@pytest.mark.timeout(6 * WAIT_SECONDS)
def test_a_driver_that_sleeps_until_another_has_its_study(
    bucket: UrlPath, postgresql_of_file: str, tmp_path: Path
) -> None:
    elsewhere = ("--storage", postgresql_of_file, "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
    study = Study(tmp_path, bucket / "studies", 1, *elsewhere)
    asleep = study.in_a_trial()
    asleep.send_signal(signal.SIGSTOP)
    refusals = 0
    while (other := study.start()).wait(WAIT_SECONDS) == 2:
        assert other.stdout is not None
        assert "gave a sign of life" in other.stdout.read()
        refusals += 1
        time.sleep(5)
    assert refusals > 3, "it was taken over from a driver that may live"
    assert other.returncode in (0, 1), other.communicate()[0]
    complete_once(study, postgresql_of_file)

    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in below(study.paths.root, "trials/*/*")}

    before = everything()
    asleep.send_signal(signal.SIGCONT)
    output, _ = asleep.communicate(timeout=120)
    assert asleep.returncode == 75, output
    assert "another driver has taken the study over" in output
    assert everything() == before
    complete_once(study, postgresql_of_file)


@pytest.mark.timeout(3 * WAIT_SECONDS)
def test_the_database_is_restarted_in_the_middle(
    postgresql_server: Server, postgresql_of_file: str, tmp_path: Path
) -> None:
    study = Study(tmp_path, tmp_path / "studies", 1, "--storage", postgresql_of_file)
    process = study.in_a_trial()
    for seconds in (5, 15):
        postgresql_server.stop()
        time.sleep(seconds)
        postgresql_server.start()
        time.sleep(3)
    output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert "study s is done: 2 trials" in output, output
    complete_once(study, postgresql_of_file)
