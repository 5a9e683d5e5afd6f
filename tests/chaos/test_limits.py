"""A worker that hangs, a budget that is spent, a bug: each ends as it should, with Ray and a whole driver."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.test_kill_and_resume import CONFIG, Driver

pytestmark = pytest.mark.chaos

HANGS_ONCE = """
from __future__ import annotations
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from trainables.attacks.contract import Attack, Attacked

@dataclass(frozen=True)
class Mine(Attack):
    changes: ClassVar[frozenset[str]] = frozenset()
    marker: str = ""

    def run(self, victim, batch):
        marker = Path(self.marker)
        if not marker.exists():
            marker.touch()
            time.sleep(3600)
        return Attacked(batch.pixels, batch.captions())
"""

FAILS = HANGS_ONCE.replace("marker.touch()", "{}[self.marker]").replace("time.sleep(3600)", "")


def with_attack(folder: Path, code: str) -> dict[str, object]:
    file = folder / "mine.py"
    file.write_text(code)
    mine = {"name": "mine", "attack": f"{file}:Mine", "options": {"marker": str(folder / "hung")}}
    return {**CONFIG["protocol"], "attacks": ["both", mine]}


@pytest.mark.timeout(900)
def test_a_worker_that_hangs_and_a_budget_that_is_spent(tmp_path: Path) -> None:
    training = {**CONFIG["trial"], "training": {"epochs": 2, "batch_size": 8}}
    driver = Driver(
        tmp_path,
        trial=training,
        recipes=["finetune"],
        protocol=with_attack(tmp_path, HANGS_ONCE),
        budget={"trials": 2, "device_hours": 1e-6, "silent_minutes": 0.3},
        cluster={"concurrency": 1},
    )
    assert driver.finish() == 0, driver.output
    assert (tmp_path / "hung").exists()
    assert "no further trial starts: budget.device_hours" in driver.output
    assert "ended by budget.device_hours" in driver.output
    manifests = driver.manifests()
    assert [manifest["state"] for manifest in manifests.values()] == ["complete"], "it was tried again"
    assert driver.finish() == 0, "nothing is left to do"
    assert driver.manifests() == manifests

    assert driver.finish("--budget.device-hours", "1") == 0, driver.output
    assert "ended by budget.trials: 3 of 3 trials" in driver.output
    assert len(driver.manifests()) == 3
    assert driver.optuna_states() == ["COMPLETE"] * 3


@pytest.mark.timeout(600)
def test_a_bug_stops_the_study(tmp_path: Path) -> None:
    training = {**CONFIG["trial"], "training": {"epochs": 2, "batch_size": 8}}
    driver = Driver(
        tmp_path,
        trial=training,
        recipes=[],
        protocol=with_attack(tmp_path, FAILS),
        budget={"trials": 9, "alike_failures": 2},
        cluster={"concurrency": 1},
    )
    assert driver.finish() == 1, driver.output
    assert driver.output.count("Traceback (most recent call last)") == 1
    assert "2 trials failed alike, KeyError at " in driver.output
    assert "mine.py:" in driver.output
    assert "--accept-changes" in driver.output
    manifests = driver.manifests()
    assert [manifest["state"] for manifest in manifests.values()] == ["failed"] * 2
    assert all("KeyError" in str(manifest["trace"]) for manifest in manifests.values())
    assert json.loads((driver.study / "front.json").read_text()) == []

    assert "2 failed; to run them again: python -m study.run --name chaos" in driver.output
    (tmp_path / "hung").touch()  # mended
    assert driver.finish("--budget.trials", "2", "--retry-failed") == 0, driver.output
    for key, manifest in driver.manifests().items():
        causes = [attempt["cause"] for attempt in manifest["attempts"]]
        assert (manifest["state"], manifest["number"], causes) == (
            "complete",
            manifests[key]["number"],
            ["bug", "complete"],
        )
        held = sum(one["devices"] * (one["ended"] - one["began"]) for one in manifest["attempts"])
        assert manifest["cost"]["device_seconds"] == pytest.approx(held)
    assert driver.optuna_states() == ["COMPLETE"] * 2
