"""What the controller costs a large study: `python -m benchmarks.controller`.

A study with many finished trials and many that run, on its SQLite file, with manifests and logs on disk, without Ray:
how long it takes to open, to ask for a trial, to judge a rung and to account for an end, and how much memory it holds.
Besides the time it took, the processor time is shown, which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import psutil

from search_spaces.space import suggest
from study.config import COST, Budget, Objective, StudyConfig
from study.execution.simulator import Surrogate
from study.front.estimates import front
from study.front.hypervolume import hypervolume_history
from study.ledger.ledger import Ledger
from study.ledger.store import open_storage
from study.ledger.trials import point_of, trial_key
from study.records import Event, Manifest, TrialRecord, append_event
from trainables.config import Point, TrialConfig
from trainables.results import Metric, Outcome, TrialResult

OBJECTIVES = (Objective(metric="clean/mr_r5"), Objective(metric="both/mr_r5"))


def measurements(point: Point, rng: np.random.Generator) -> dict[str, float]:
    """Recalls of a point with noise."""
    clean, robust = Surrogate().final(point, TrialConfig().protocol)
    return {"clean/mr_r5": clean + 0.02 * rng.standard_normal(), "both/mr_r5": robust + 0.02 * rng.standard_normal()}


def fill(config: StudyConfig, count: int) -> None:
    """Write a study with so many ended trials, half of them stopped after the first epoch.

    The rows are written as Optuna lays them out, because through Optuna each trial is a transaction of its own.
    """
    config.paths.root.mkdir(parents=True, exist_ok=True)
    directions = [objective.direction for objective in config.objectives]
    source = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), directions=directions)
    optuna.create_study(study_name=config.name, storage=open_storage(config.paths, None), directions=directions)
    rng = np.random.default_rng(0)
    with sqlite3.connect(config.paths.database) as database:
        insert = database.execute
        for number in range(count):
            trial = source.ask()
            params = suggest(config.space, trial)
            point = Point.model_validate(params)
            values = measurements(point, rng)
            stopped = number % 2 == 1
            insert(
                "INSERT INTO trials (trial_id, number, study_id, state, datetime_start, datetime_complete)"
                " VALUES (?, ?, 1, ?, ?, ?)",
                (number + 1, number, "PRUNED" if stopped else "COMPLETE", *["2026-01-01 00:00:00.000000"] * 2),
            )
            for name, distribution in trial.distributions.items():
                insert(
                    "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)"
                    " VALUES (?, ?, ?, ?)",
                    (
                        number + 1,
                        name,
                        distribution.to_internal_repr(params[name]),
                        optuna.distributions.distribution_to_json(distribution),
                    ),
                )
            for index, value in enumerate([] if stopped else values.values()):
                insert(
                    "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (?, ?, ?, 'FINITE')",
                    (number + 1, index, value),
                )
            key = trial_key(config.name, number)
            manifest = Manifest(
                key=key,
                number=number,
                recipe=None,
                params=params,
                point=point.model_dump(mode="json"),
                state="stopped" if stopped else "complete",
                metrics={} if stopped else {n: Metric(value=v, low=v, high=v) for n, v in values.items()},
                rungs={14: {**values, COST: 5.0}},
                cost={"device_seconds": 5.0 if stopped else 16.0},
                fingerprint="benchmark",
                ended=float(number),
            )
            path = config.paths.manifest(key)
            path.parent.mkdir(parents=True)
            path.write_text(manifest.model_dump_json(), encoding="utf-8")


Times = list[tuple[float, float]]
"""Seconds on the clock, and of the processor."""


def timed(call: Callable[[], object], times: Times) -> object:
    """Call it, and keep how long it took."""
    began = time.perf_counter(), time.process_time()
    result = call()
    times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return result


def measure(finished: int, running: int, rounds: int, folder: Path) -> dict[str, str]:
    """One size of study.

    Args:
        finished: ended trials.
        running: trials that run at once.
        rounds: how often to ask and tell.
        folder: for the study's files.
    """
    config = StudyConfig(
        name=f"s{finished}",
        studies_dir=folder,
        recipes=(),
        objectives=OBJECTIVES,
        budget=Budget(trials=1_000_000),
    )
    fill(config, finished)
    opening: Times = []
    quick = config.model_copy(update={"sampler": "random"})
    first = timed(lambda: Ledger(quick, config.paths, "benchmark"), opening)
    assert isinstance(first, Ledger)
    started = [first.take() for _ in range(running)]
    del first
    reconciling: Times = []
    ledger = timed(lambda: Ledger(config, config.paths, "benchmark"), reconciling)
    assert isinstance(ledger, Ledger)
    seconds: dict[str, Times] = {"ask": [], "rung": [], "tell": [], "records": [], "front": [], "history": []}
    rng, trial = np.random.default_rng(1), TrialConfig()
    for index in range(rounds):
        record = timed(ledger.take, seconds["ask"])
        assert isinstance(record, TrialRecord)
        started.append(record)
        record = started.pop(0)
        values = measurements(point_of(config, record), rng)
        metrics = {**values, COST: 5.0}
        timed(partial(ledger.rung, record, 14, 1, metrics), seconds["rung"])
        append_event(config.paths.events(record.key), Event(time=index, event="rung", step=14, metrics=metrics))
        result = TrialResult(
            metrics={name: Metric(value=value, low=value, high=value) for name, value in values.items()},
            correct={},
            queries={},
            device_seconds=16,
            seconds={},
            steps=42,
            resumed_from_steps=[],
            temperature=0.06,
            hashes={},
            versions={},
        )
        outcome = Outcome(state="complete", result=result)
        timed(partial(ledger.finish, record, outcome, trial), seconds["tell"])
        timed(ledger.records, seconds["records"])
        if index % 10 == 0:
            timed(partial(front, ledger.manifests(), OBJECTIVES), seconds["front"])
            timed(partial(hypervolume_history, ledger.manifests(), OBJECTIVES), seconds["history"])
    resident = psutil.Process().memory_info().rss
    row = {}
    for name, times in (("open", opening), (f"reconcile {running} running", reconciling)):
        row[f"{name}, s"] = f"{times[0][0]:.2f}, processor {times[0][1]:.2f}"
    for name, times in seconds.items():
        median, busy = 1000 * np.median(times, axis=0)
        worst = 1000 * np.percentile(times, 99, axis=0)[0]
        row[f"{name}, ms"] = f"{median:.1f} (p99 {worst:.1f}), processor {busy:.1f}"
    return {**row, "resident, MB": f"{resident / 1e6:.0f}"}


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finished", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--running", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=100)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = {count: measure(count, options.running, options.rounds, Path(folder)) for count in options.finished}
    width = max(len(name) for row in rows.values() for name in row) + 2
    print(" " * width + "".join(f"{f'{count} finished':40}" for count in rows))
    for name in next(iter(rows.values())):
        print(f"{name:{width}}" + "".join(f"{row[name]:40}" for row in rows.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
