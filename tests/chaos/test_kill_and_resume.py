"""A whole tiny study: killed three times, resumed, extended, projected; nothing lost, nothing doubled."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml

from trainables.execution.checkpoints import KEPT
from trainables.execution.signals import RESUMABLE

CONFIG: dict[str, Any] = {
    "recipes": ["finetune", "mat"],
    "objectives": [{"metric": "clean/mr_r5"}, {"metric": "both/mr_r5"}],
    "budget": {"trials": 2},
    "data": {"image_pixels": 32, "shapes": {"train_images": 64, "val_images": 40, "test_images": 40}},
    "trial": {
        "model": {
            "tiny": {"width": 32, "layers": 1, "heads": 2, "patch_pixels": 8, "embedding": 32},
            "pretrain": {"epochs": 80, "batch_size": 16, "mlm_epochs": 1},
        },
        "training": {"epochs": 12, "batch_size": 8},
    },
    # Images enough to tell what comes out from chance: otherwise the exit code is 1.
    "protocol": {
        "gallery_images": 40,
        "image_steps": 2,
        "bootstrap_samples": 100,
        "rung_gallery_images": 6,
        "rung_growth": 0,
    },
}
WAIT_SECONDS = 300
STARTS = 3
"""Of Ray, at most, on a busy machine."""

pytestmark = pytest.mark.chaos


def programs_of(process: int) -> set[str]:
    """What the descendants of a process run."""
    found = set()
    for child in psutil.Process(process).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found.update(Path(name).name for name in child.cmdline()[:1])
    return found


class Driver:
    """`python -m study.run` of one study, as a process of its own."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.folder, self.study = folder, folder / "studies" / "chaos"
        (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))

    def start(self, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "study.run", "--config", str(self.folder / "config.yaml"), "--name", "chaos"]
        return subprocess.Popen(
            [*command, "--studies-dir", str(self.study.parent), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )

    def until(self, happened: Callable[[], bool], number: int, *flags: str) -> int:
        """Start, wait until something happened, send a signal; returns the exit code."""
        for process in self._starts(*flags):
            end = time.time() + WAIT_SECONDS
            while not happened() and process.poll() is None:
                assert time.time() < end, "waited too long"
                time.sleep(0.05)
            if process.poll() is None:
                assert "uv" not in programs_of(process.pid), "slow workers"
                process.send_signal(number)
            self.output, _ = process.communicate(timeout=60)
        assert happened(), self.output
        return process.returncode

    def finish(self, *flags: str) -> int:
        for process in self._starts(*flags):
            self.output, _ = process.communicate(timeout=WAIT_SECONDS * 2)
        return process.returncode

    def _starts(self, *flags: str) -> Iterator[subprocess.Popen[str]]:
        """Again where Ray, which waits for its own processes 15 s, did not start on a busy machine."""
        for _ in range(STARTS):
            process = self.start(*flags)
            yield process
            if process.returncode != RESUMABLE or "Ray did not start" not in self.output:
                return

    def events(self, kind: str) -> list[dict[str, object]]:
        lines = [line for path in self.study.glob("trials/*/events.jsonl") for line in path.read_text().splitlines()]
        found = []
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event["event"] == kind:
                found.append(event)
        return found

    def manifests(self) -> dict[str, dict[str, Any]]:
        return {path.parent.name: json.loads(path.read_text()) for path in self.study.glob("trials/*/manifest.json")}

    def optuna_states(self) -> list[str]:
        study = optuna.load_study(study_name="chaos", storage=f"sqlite:///{self.study / 'study.db'}")
        return [trial.state.name for trial in study.trials]

    def mlflow_runs(self) -> list[Any]:
        from study.tracking.mlflow_store import import_mlflow

        client = import_mlflow().MlflowClient(tracking_uri=f"sqlite:///{self.study / 'mlflow.db'}")
        (experiment,) = [e for e in client.search_experiments() if e.name == "paretovl/chaos"]
        return list(client.search_runs([experiment.experiment_id], max_results=100))


@pytest.mark.timeout(900)
def test_killed_three_times_and_resumed(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    assert driver.until(lambda: (driver.study / "study.db").exists(), signal.SIGKILL) == -signal.SIGKILL
    assert driver.until(lambda: bool(driver.events("rung")), signal.SIGKILL) == -signal.SIGKILL
    assert driver.until(lambda: bool(driver.manifests()), signal.SIGKILL) == -signal.SIGKILL
    started = len(driver.events("start"))
    assert driver.until(lambda: len(driver.events("start")) > started, signal.SIGINT) == 130
    assert "to go on: python -m study.run --name chaos" in driver.output
    assert driver.finish() == 0, driver.output

    manifests = driver.manifests()
    assert len(manifests) == 4
    assert {m["state"] for m in manifests.values()} == {"complete"}
    assert driver.optuna_states() == ["COMPLETE"] * 4
    resumed = [event for event in driver.events("resume") if event["step"]]
    assert resumed, "no trial went on from a checkpoint"
    assert any(manifest["cost"]["resumed_from_steps"] for manifest in manifests.values())

    runs = driver.mlflow_runs()
    trials = [run.data.tags["paretovl.trial"] for run in runs if "paretovl.trial" in run.data.tags]
    assert sorted(trials) == sorted(manifests)
    assert {run.info.status for run in runs} == {"FINISHED"}
    front = {entry["key"] for entry in json.loads((driver.study / "front.json").read_text())}
    assert front
    assert front == {run.data.tags["paretovl.trial"] for run in runs if run.data.tags.get("pareto") == "true"}

    began = time.time()
    assert driver.finish() == 0
    assert time.time() - began < 30, "a finished study must not start anything"
    assert driver.manifests() == manifests
    assert driver.finish("--budget.trials", "3") == 0
    assert len(driver.manifests()) == 5
    assert driver.finish("--budget.trials", "3", "--protocol.words", "0") == 2
    assert "protocol.words: 1 -> 0" in driver.output


@pytest.mark.timeout(600)
def test_a_trial_that_diverges_is_recorded_and_one_whose_checkpoints_are_damaged_begins_anew(tmp_path: Path) -> None:
    # A temperature that is zero in single precision: the contrastive loss is not a number from the first step.
    driver = Driver(tmp_path, recipes=["mat"], recipe_temperature=1e-320, budget={"trials": 2})
    one_at_a_time = ("--cluster.concurrency", "1")
    assert driver.until(lambda: len(driver.events("rung")) > 1, signal.SIGINT, *one_at_a_time) == 130, driver.output
    diverged = driver.manifests()["chaos-t00000-s0"]
    assert diverged["state"] == "infeasible"
    assert "Diverged: the loss became nan by step" in str(diverged["reason"])
    damaged = sorted(driver.study.glob("runs/chaos-t00001-s0/**/model.safetensors"))
    for weights in damaged:
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    assert driver.finish(*one_at_a_time) == 0, driver.output
    begun_anew = driver.manifests()["chaos-t00001-s0"]
    assert begun_anew["state"] == "complete", "no trial is lost with its checkpoints"
    assert [("not what was written" in line) for line in begun_anew["cost"]["passed_over"]] == [True] * min(
        len(damaged), KEPT
    )
    (told,) = [event for event in driver.events("resume") if event["message"] != "from step 0" and not event["step"]]
    assert "not what was written: model.safetensors" in str(told["message"])
    assert "Traceback" not in driver.output
    assert driver.optuna_states() == ["PRUNED", "COMPLETE", "COMPLETE"]
    statuses = {run.data.tags.get("paretovl.trial"): run.info.status for run in driver.mlflow_runs()}
    assert statuses["chaos-t00000-s0"] != "FINISHED"
    assert statuses["chaos-t00001-s0"] == "FINISHED"
    assert driver.finish("--budget.trials", "3") == 0, "the study can be used afterwards"
    assert driver.optuna_states() == ["PRUNED", "COMPLETE", "COMPLETE", "COMPLETE"]
