"""A driver whose trials take milliseconds, and a way to kill it at random points until its study is done.

    python -m tests.chaos.simulated FOLDER --kills 120 --seed 1

Everything is real but Ray and the training: the lease, the ledger, the searcher, the database, logs, checkpoints,
manifests, front files and MLflow. Each driver is a fork of a process that has the libraries imported, so that it is at
work within milliseconds and a kill can hit any instruction of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna

from dashboards.pareto_page import write_front_files
from study.config import Budget, StudyConfig
from study.execution.tune_searcher import LedgerSearcher
from study.ledger.lease import Lease, driver_lock
from study.ledger.ledger import Ledger
from study.ledger.ownership import claim
from study.ledger.store import open_storage
from study.ledger.trials import point_of
from study.paths import StudyPaths
from study.records import Event, Manifest, TrialRecord, write_atomically
from study.run import prepare_folder
from study.tracking.background import Background
from study.tracking.mlflow_store import TrackingError, import_mlflow
from study.tracking.projection import Projection, default_uri
from tests.study.helpers import complete, ended, study
from trainables.config import TrialConfig
from trainables.execution.worker import Patience
from trainables.results import Outcome

RUNGS = 3


def simulated_study(folder: Path, trials: int, **fields: Any) -> StudyConfig:
    """A study of so many searched trials and two recipes."""
    return study(folder, budget=Budget(trials=trials), **fields)


def ends(trial: TrialConfig) -> Outcome:
    """How a trial ends: a function of its point alone. One in four diverges."""
    digest = hashlib.sha256(trial.point.model_dump_json().encode()).digest()
    if digest[2] < 64:
        return Outcome(state="infeasible", reason="Diverged: nan")
    return complete(digest[0] / 256, digest[1] / 256, device_seconds=10)


def drive(config: StudyConfig, rung_seconds: float, with_mlflow: bool) -> None:
    """What a session does, one trial at a time."""
    prepare_folder(config.paths)
    storage = open_storage(config.paths, config.storage)
    with driver_lock(config), Lease(storage.engine, config.name, lambda _: None):
        found = claim(config, storage, {"mark": 1}, accept_changes=False)
        ledger = Ledger(config, config.paths, found, database=storage)
        tracking = None
        if with_mlflow:
            projection = Projection(config.paths, None, config.name, config.objectives)
            tracking = Background("MLflow", lambda asked: projection.sync(*asked), interval_seconds=0.05)

        def changed(record: TrialRecord, what: Event | Manifest) -> None:
            if isinstance(what, Manifest):
                write_front_files(config.paths, ledger.manifests(), config.objectives, config.name, config.protocol)
            if tracking is not None:
                tracking.request((ledger.records(), None))

        def make(record: TrialRecord) -> TrialConfig:
            return TrialConfig(key=record.key, point=point_of(config, record))

        searcher = LedgerSearcher(ledger, make, Patience(), lambda: True, changed)
        while isinstance(suggestion := searcher.suggest("only"), dict):
            run(config.paths, searcher, TrialConfig.model_validate(suggestion["trial"]), rung_seconds)
        write_front_files(config.paths, ledger.manifests(), config.objectives, config.name, config.protocol)
        if tracking is not None:
            tracking.finish((ledger.records(), "finished"))
            if tracking.last_error is not None:
                raise TrackingError(tracking.last_error)


def run(paths: StudyPaths, searcher: LedgerSearcher, trial: TrialConfig, rung_seconds: float) -> None:
    """A trial that goes on from its checkpoint and ends as its point says."""
    checkpoint = paths.runs / trial.key / "checkpoint.json"
    begun = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
    for step in range(begun + 1, RUNGS + 1):
        time.sleep(rung_seconds)
        write_atomically(checkpoint, json.dumps({"step": step}))
        report = {"step": step, "epoch": step, "last": step == RUNGS, "resumed_from_step": begun or -1, "history": "[]"}
        searcher.rung("only", {**report, "device_seconds": 10 * step / RUNGS, "clean/mr_r1": 0.5})
    searcher.on_trial_complete("only", ended(ends(trial)))


@dataclass
class Account:
    """What a study says of itself in all its stores."""

    kills: int
    trials: list[tuple[int, str, dict[str, Any], list[float] | None]]
    manifests: dict[str, Any]
    front: list[dict[str, Any]]
    runs: list[tuple[str, str, str | None]]

    @classmethod
    def of(cls, config: StudyConfig, kills: int = 0) -> Account:
        """Read it."""
        paths = config.paths
        stored = optuna.load_study(study_name=config.name, storage=open_storage(paths, None)).trials
        manifests = {}
        for path in sorted(paths.root.glob("trials/*/manifest.json")):
            manifest = json.loads(path.read_text())
            kept = ("state", "reason", "params", "recipe", "metrics", "fingerprint")
            manifests[manifest["key"]] = {name: manifest[name] for name in kept}
        runs = []
        if paths.mlflow_database.exists():
            client = import_mlflow().MlflowClient(default_uri(paths))
            experiments = [found.experiment_id for found in client.search_experiments()]
            found = client.search_runs(experiments, max_results=5000)
            runs = [(run.info.run_name, run.info.status, run.data.tags.get("pareto")) for run in found]
        return cls(
            kills,
            [(trial.number, trial.state.name, trial.params, trial.values) for trial in stored],
            manifests,
            json.loads(paths.front.read_text()),
            sorted(runs),
        )


def kill_until_done(config: StudyConfig, kills: int, seed: int, rung_seconds: float, with_mlflow: bool) -> Account:
    """Kill drivers at random points, at least so often, then let the last one finish."""
    draw = random.Random(seed)
    survived = killed = 0
    while True:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                drive(config, rung_seconds, with_mlflow)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if killed < kills:
            time.sleep(draw.uniform(0, 2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif status:
            raise RuntimeError(f"a driver ended with status {status} after {killed} kills")
        else:
            survived += 1
            if killed >= kills:
                return Account.of(config, killed)
            if survived > kills:
                raise RuntimeError(f"the study was done after {killed} kills; give it more trials")


def main() -> None:
    """Kill a study, run the same one undisturbed, and print both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rung-seconds", type=float, default=0.01)
    parser.add_argument("--mlflow", action="store_true")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if given.mlflow:
        import_mlflow()
    accounts = {}
    for name, kills in (("killed", given.kills), ("undisturbed", 0)):
        config = simulated_study(given.folder / name, given.trials)
        began = time.time()
        account = kill_until_done(config, kills, given.seed, given.rung_seconds, given.mlflow)
        accounts[name] = {**asdict(account), "seconds": round(time.time() - began, 1)}
    json.dump(accounts, sys.stdout)


if __name__ == "__main__":
    main()
