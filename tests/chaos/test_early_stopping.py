"""A tiny study on Ray whose trials are stopped early: what they hold is given back, and the account is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_kill_and_resume import CONFIG, Driver

from study.records import Manifest


@pytest.mark.timeout(400)
def test_stopped_trials_make_room_and_are_accounted_for(tmp_path: Path) -> None:
    # On two cores, the next trial can only begin when the stopped one has given back its worker.
    driver = Driver(
        tmp_path,
        recipes=["finetune"],
        budget={"trials": 2},
        early_stopping={"enabled": True, "eta": 2},
        # With one objective and eta 2, the second of two trials is stopped if it is the worse, and an attack without
        # measure is worse at clean recall than clean fine-tuning.
        points=[{"contrastive_weight": 1.0, "temperature": 0.06, "epsilon": "8/255", "attack_steps": 2, "words": 2}],
        objectives=[{"metric": "clean/mr_r5"}],
        protocol={**CONFIG["protocol"], "rung_gallery_images": 40},  # among six images both find everything
        trial={**CONFIG["trial"], "training": {"epochs": 4, "batch_size": 8}, "workers": {"cpus_per_worker": 1.3}},
    )
    assert driver.finish("--cluster.concurrency", "1") == 0, driver.output
    manifests = {key: Manifest.model_validate(manifest) for key, manifest in driver.manifests().items()}
    stopped = {key: manifest for key, manifest in manifests.items() if manifest.state == "stopped"}
    assert len(manifests) == 3
    assert stopped, driver.output
    assert f"{len(stopped)} stopped, " in driver.output
    assert sorted(driver.optuna_states()) == ["COMPLETE"] * (3 - len(stopped)) + ["PRUNED"] * len(stopped)
    for manifest in stopped.values():
        assert manifest.reason is not None
        assert manifest.reason.startswith(f"stopped at step {max(manifest.rungs)}")
        assert manifest.metrics == {}
        assert manifest.cost["steps"] == max(manifest.rungs) < 4 * 8
    left = {path.parents[1].name for path in (driver.study / "runs").glob("*/*/state.json")}
    # The trials after it took longer than its own last epochs would have, which would have left a checkpoint.
    assert left == manifests.keys() - stopped.keys(), "a checkpoint that nothing uses, or a Ray Train run that went on"
    front = {entry["key"] for entry in json.loads((driver.study / "front.json").read_text())}
    assert not front & stopped.keys()
    states = {run.data.tags.get("paretovl.trial"): (run.info.status, run.data.tags["state"]) for run in trials(driver)}
    assert {states[key] for key in stopped} == {("KILLED", "stopped")}


def trials(driver: Driver) -> list:
    return [run for run in driver.mlflow_runs() if "paretovl.trial" in run.data.tags]
