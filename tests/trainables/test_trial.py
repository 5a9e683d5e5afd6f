"""A trial's reports all reach Ray Tune, the outcome last."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

from trainables.config import Point, ShapesConfig, TrialConfig
from trainables.data.shapes import write
from trainables.execution.checkpoints import SNAPSHOT
from trainables.execution.places import absolute
from trainables.execution.worker import _exit_stuck, take_marker
from trainables.prepare import prepare
from trainables.results import Outcome, TrialResult
from trainables.training.finetune import finetune

REPORTS = 40

SCRIPT = """
    import json, sys
    import ray
    from ray import tune
    from trainables.config import TrialConfig
    from trainables.execution.worker import Patience
    from trainables.results import Attempt, Outcome

    def ends_at_once(config):
        from trainables import trial
        from trainables.execution import attempt

        def attempted(config, patience, group, reports, nodes):
            for number in range({reports}):
                attempt.Follow(group, reports).after_report(None, [{{"number": number}}])
            return Attempt(began=0, devices=1), Outcome(state="failed", reason="as told")

        attempt.attempt = attempted
        trial.tune_trial(config)

    seen = []
    class Count(tune.Callback):
        def on_trial_result(self, iteration, trials, trial, result, **info):
            seen.append(result.get("number", result.get("outcome")))

    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    config = {{"trial": TrialConfig().model_dump(mode="json"), "patience": Patience().model_dump()}}
    config["place"] = "0" * 36
    tune.Tuner(
        tune.with_resources(ends_at_once, {{"CPU": 0.1}}),
        param_space=config,
        run_config=tune.RunConfig(storage_path=sys.argv[1], callbacks=[Count()], verbose=0),
    ).fit()
    print("SEEN", json.dumps(seen))
"""


def test_the_last_reports_do_not_wait_for_each_other(tmp_path: Path) -> None:
    script = textwrap.dedent(SCRIPT.format(reports=REPORTS))
    environment = {**os.environ, "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = json.loads(done.stdout.split("SEEN ")[1].splitlines()[0])
    assert seen[:REPORTS] == list(range(REPORTS))
    assert json.loads(seen[REPORTS])["reason"] == "as told"


def test_a_stuck_worker_leaves_word(tmp_path: Path) -> None:
    trial = TrialConfig(key="k", storage_path=str(tmp_path))
    (tmp_path / "k").mkdir()
    assert take_marker(trial, "stuck") is None
    if (child := os.fork()) == 0:
        _exit_stuck(trial, 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert take_marker(trial, "stuck") == ""
    assert take_marker(trial, "stuck") is None, "told once"


@pytest.mark.timeout(300)
def test_a_trial_by_itself_in_its_own_folder(
    tiny_trial: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths, a damaged checkpoint, a torn account of Ray Train's, and another trial in the same place."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs", ShapesConfig(train_images=64, val_images=16, test_images=16))
    changes = {
        "point": Point(contrastive_weight=0.0),
        "data": tiny_trial.data.model_copy(update={"root": Path("pairs")}),
        "training": tiny_trial.training.model_copy(update={"epochs": 3, "epoch_images": 16}),
        "cache_dir": Path("cache"),
        "storage_path": "runs",
    }
    config = tiny_trial.model_copy(update=changes)
    for name, trial in {"a": config, "b": config.model_copy(update={"point": Point()})}.items():
        Path(f"{name}.yaml").write_text(trial.model_dump_json())

    prepared = prepare(absolute(config))
    finetune(config, prepared, torch.device("cpu"), None, tmp_path / "alone", lambda metrics, folder: None)
    folder = tmp_path / "runs" / config.key
    for step in (2, 4):
        shutil.copytree(tmp_path / "alone" / f"step-{step}", folder / f"checkpoint_{step}")
    optimiser = folder / "checkpoint_4" / "optimiser.pt"
    optimiser.write_bytes(optimiser.read_bytes()[:-1] + b"!")
    (folder / SNAPSHOT).write_text('{"ray_version": ')
    made = sorted(path.name for path in (tmp_path / "cache").iterdir())

    with tempfile.TemporaryDirectory(dir="/tmp") as ray_folder:

        def run(name: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "trainables.trial", name]
            environment = {
                **os.environ,
                "RAY_TMPDIR": ray_folder,
                "TMPDIR": ray_folder,
                "PYTHONPATH": str(Path(__file__).parents[2]),
            }
            return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)

        done = run("a.yaml")
        assert done.returncode == 1, done.stdout + done.stderr
        assert "warning: no better than chance before any attack" in done.stderr, "as small as it is"
        elsewhere = list(Path(ray_folder).rglob("images-*.npy"))
        assert elsewhere == [], "a worker did not find what was prepared"
        assert not list(Path(ray_folder).rglob("step-*")), "what was written is uploaded and gone"
        assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == made
        refused = run("b.yaml")
    result = Outcome.model_validate_json(done.stdout).result
    assert result is not None
    assert result.resumed_from_steps == [2]
    assert [line.partition(" cannot be read")[0].rpartition("/")[2] for line in result.passed_over] == ["checkpoint_4"]
    alone = TrialResult.model_validate_json((tmp_path / "alone" / "step-6" / "result.json").read_text())
    assert result.metrics == alone.metrics
    assert len([path for path in folder.glob("checkpoint_*") if path.is_dir()]) == 1
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "point.contrastive_weight: 0.0 -> 1.0" in refused.stderr
    assert "give this trial another key or storage_path" in refused.stderr
