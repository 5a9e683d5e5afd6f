"""A trial's reports all reach Ray Tune, the outcome last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from trainables.config import TrialConfig
from trainables.finetune import Diverged
from trainables.trial import Outcome, _leave_stuck, _own_fault, _was_stuck

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


def test_lost_workers_are_nobodys_fault() -> None:
    # Ray tells of lost workers with its own exceptions, without a trace; what the trial raises comes with one.
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    lost = WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError("gone"))
    assert _own_fault({0: lost}) is None
    own = UserExceptionWithTraceback(KeyError("x"), "Traceback ...")
    for failures in ({0: own}, {0: lost, 1: own}):
        assert _own_fault(failures) == Outcome(state="failed", reason="KeyError: 'x'", trace="Traceback ...")
    diverged = UserExceptionWithTraceback(Diverged("nan"), "Traceback ...")
    assert _own_fault({0: diverged}) == Outcome(state="infeasible", reason="Diverged: nan")


def test_a_stuck_worker_leaves_word(tmp_path: Path) -> None:
    trial = TrialConfig(key="k", storage_path=str(tmp_path))
    (tmp_path / "k").mkdir()
    assert not _was_stuck(trial)
    if (child := os.fork()) == 0:
        _leave_stuck(trial, 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert _was_stuck(trial)
    assert not _was_stuck(trial), "told once"
