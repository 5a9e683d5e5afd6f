"""A trial's reports all reach Ray Tune, the outcome last."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

from trainables.config import TrialConfig
from trainables.training.finetune import Diverged
from trainables.trial import TRACE, Outcome, _exit_stuck, _own_fault, _take_marker

REPORTS = 40

SCRIPT = """
    import json, sys
    import ray
    from ray import tune
    from trainables.config import TrialConfig
    from trainables.trial import Outcome, Patience

    def ends_at_once(config):
        from trainables import trial

        def run_trial(config, patience, callbacks):
            for number in range({reports}):
                for callback in callbacks:
                    callback.after_report(None, [{{"number": number}}], None)
            return Outcome(state="failed", reason="as told")

        trial.run_trial = run_trial
        trial.tune_trial(config)

    seen = []
    class Count(tune.Callback):
        def on_trial_result(self, iteration, trials, trial, result, **info):
            seen.append(result.get("number", result.get("outcome")))

    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    config = {{"trial": TrialConfig().model_dump(mode="json"), "patience": Patience().model_dump()}}
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


def raised(error: Exception) -> Exception:
    setattr(error, TRACE, "Traceback ...")
    sent: Exception = pickle.loads(pickle.dumps(error))
    return sent


def test_lost_workers_are_nobodys_fault() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
    own = raised(KeyError("x"))
    assert _own_fault({0: own}) == Outcome(state="failed", reason="KeyError: 'x'", trace="Traceback ...")
    assert _own_fault({0: raised(Diverged("nan"))}) == Outcome(state="infeasible", reason="Diverged: nan")
    assert _own_fault({0: lost}) is None
    assert _own_fault({0: raised(RuntimeError("Connection closed by peer")), 1: lost}) is None, "the peer was lost"
    assert _own_fault({0: raised(ActorDiedError())}) is None


def test_a_stuck_worker_leaves_word(tmp_path: Path) -> None:
    trial = TrialConfig(key="k", storage_path=str(tmp_path))
    (tmp_path / "k").mkdir()
    assert _take_marker(trial, "stuck") is None
    if (child := os.fork()) == 0:
        _exit_stuck(trial, 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert _take_marker(trial, "stuck") == ""
    assert _take_marker(trial, "stuck") is None, "told once"
