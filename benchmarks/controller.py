"""What the driver costs a large study: `python -m benchmarks.controller`.

A study with many ended trials and many that run, on its SQLite files, with manifests, logs and MLflow's store on disk,
and without Ray: how long the driver takes for each start, rung and end of a trial, all that it does for them included
(budget, ledger, sampler, display, front, page, MLflow), and how much memory it holds. Objectives are random trade-offs,
so that the front is large; with four, a good part of all trials are on it.

It exits with 1 if an event takes more than the goal, or grows with the study more than it may.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import logging
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from search_spaces.space import suggest
from study.config import COST, COSTS, Budget, Objective, StudyConfig
from study.execution.session import Session
from study.execution.tune_searcher import LedgerSearcher
from study.ledger.lease import Lease
from study.ledger.ledger import Ledger, read_records
from study.ledger.ownership import claim
from study.ledger.store import open_storage
from study.ledger.trials import trial_key, trial_template
from study.paths import StudyPaths
from study.records import Event, Manifest, append_event, read_frozen, read_manifests, study_id
from study.tracking.mlflow_store import POINTS_TAG, import_mlflow
from study.tracking.projection import Projection, default_uri, trial_run
from trainables.config import Point
from trainables.results import Attempt, Metric, Outcome, TrialResult
from trainables.trial import closing

TARGETS = ("clean", "both", "image", "text")
RECIPES = ("finetune", "tecoa_itr", "fare", "mat")
IMAGES, CAPTIONS = 200, 1000
EVENTS = ("start", "rung", "end")
MEDIAN_MS, RESIDENT_MB, GROWTH = 100, 1500, 1.3
"""Goals: of an event, of the driver, and of an event from the first size of study to the last."""


def measurements(rng: np.random.Generator) -> dict[str, float]:
    """Recalls of a trial: near a sphere, so few trials dominate others."""
    direction = np.abs(rng.standard_normal(len(TARGETS)))
    values = direction / np.linalg.norm(direction) * (1 - 0.03 * abs(rng.standard_normal()))
    return {f"{target}/mr_r1": float(value) for target, value in zip(TARGETS, values, strict=True)}


def metrics_of(values: dict[str, float]) -> dict[str, Metric]:
    """With intervals of usual width."""
    return {name: Metric(value=value, low=value - 0.02, high=value + 0.02) for name, value in values.items()}


def answers(values: dict[str, float], rng: np.random.Generator) -> dict[str, str]:
    """Correctness bits of each query, as a manifest has them."""
    found: dict[str, str] = {}
    for name, value in values.items():
        for direction, queries in (("tr", IMAGES), ("ir", CAPTIONS)):
            bits = base64.b64encode(np.packbits(rng.random(queries) < value).tobytes()).decode()
            found |= {f"{name.partition('/')[0]}/{direction}_r{k}": bits for k in (1, 5, 10)}
    return found


def fill(config: StudyConfig, count: int) -> None:
    """Write a study with so many ended trials, half of them stopped after the first epoch.

    The rows are written as Optuna lays them out, because through Optuna each trial is a transaction of its own.
    """
    config.paths.root.mkdir(parents=True, exist_ok=True)
    directions = [objective.direction for objective in config.objectives]
    source = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), directions=directions)
    storage = open_storage(config.paths, None)
    mark, owner = claim(config, storage, {}, accept_changes=False), study_id(config.paths)
    storage.engine.dispose()
    rng = np.random.default_rng(0)
    with sqlite3.connect(config.paths.database) as database:
        insert = database.execute
        for number in range(count):
            trial = source.ask()
            params = suggest(config.space, trial)
            point = Point.model_validate(params)
            values = measurements(rng)
            stopped = number % 2 == 1
            recipe = RECIPES[number // 2] if number < 2 * len(RECIPES) and not stopped else None
            insert(
                "INSERT INTO trials (trial_id, number, study_id, state, datetime_start, datetime_complete)"
                " VALUES (?, ?, 1, ?, ?, ?)",
                (number + 1, number, "PRUNED" if stopped else "COMPLETE", *["2026-01-01 00:00:00.000000"] * 2),
            )
            if recipe:
                insert(
                    "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, 'recipe', ?)",
                    (number + 1, json.dumps(recipe)),
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
            for index, objective in enumerate([] if stopped else config.objectives):
                insert(
                    "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (?, ?, ?, 'FINITE')",
                    (number + 1, index, values[objective.metric]),
                )
            key = trial_key(config.name, number)
            manifest = Manifest(
                study=owner,
                key=key,
                number=number,
                recipe=recipe,
                params=params,
                point=point.model_dump(mode="json"),
                state="stopped" if stopped else "complete",
                metrics={} if stopped else metrics_of(values),
                rungs={14: {**values, COST: 5.0}},
                cost={"device_seconds": 5.0 if stopped else 16.0},
                correct={} if stopped else answers(values, rng),
                queries={} if stopped else {"tr": IMAGES, "ir": CAPTIONS},
                captions_per_image=[] if stopped else [CAPTIONS // IMAGES] * IMAGES,
                fingerprint=mark,
                ended=float(number),
            )
            path = config.paths.manifest(key)
            path.parent.mkdir(parents=True)
            path.write_text(manifest.model_dump_json(), encoding="utf-8")
            append_event(config.paths.events(key), Event(time=number, event="start"))
            append_event(config.paths.events(key), Event(time=number, event="end"))
    fill_mlflow(config)


def fill_mlflow(config: StudyConfig) -> None:
    """Write the runs of the ended trials as MLflow lays them out, for the same reason, but for their points."""
    from mlflow.store.tracking.dbmodels.models import SqlParam, SqlRun, SqlTag
    from sqlalchemy import create_engine, insert

    paths, uri = config.paths, default_uri(config.paths)
    projection = Projection(paths, None, config.name, config.objectives)
    projection.sync([])
    experiment = import_mlflow().MlflowClient(tracking_uri=uri).get_experiment_by_name(projection.experiment)
    records = read_records(config.name, open_storage(paths, None))
    runs, tags, params = [], [], []
    for record, manifest in zip(records, read_manifests(paths, records), strict=True):
        run = trial_run(record, manifest, [Event(time=manifest.ended, event="start")], False, None, {})
        assert run is not None
        name = f"{record.number:032x}"
        place = f"{experiment.artifact_location}/{name}/artifacts"
        runs.append(
            {
                "run_uuid": name,
                "name": run.name,
                "status": run.status,
                "start_time": round(1000 * manifest.ended),
                "end_time": round(1000 * manifest.ended),
                "artifact_uri": place,
                "experiment_id": int(experiment.experiment_id),
            }
        )
        given = {**run.tags, "mlflow.runName": run.name, POINTS_TAG: str(len(run.points))}
        tags += [{"run_uuid": name, "key": key, "value": value} for key, value in given.items()]
        params += [{"run_uuid": name, "key": key, "value": value} for key, value in run.params.items()]
    with create_engine(uri).begin() as connection:
        for table, rows in ((SqlRun, runs), (SqlTag, tags), (SqlParam, params)):
            connection.execute(insert(table), rows)


Times = list[tuple[float, float]]
"""Seconds on the clock, and of the processor in the driver's own thread, whatever else the machine does."""


def timed(call: Callable[[], object], times: Times) -> None:
    """Call it, and keep how long it took."""
    began = time.perf_counter(), time.thread_time()
    call()
    times.append((time.perf_counter() - began[0], time.thread_time() - began[1]))


Measured = tuple[dict[str, Times], float, int]
"""Times by kind of event, MB, points on the front."""


def start_running(config: StudyConfig, paths: StudyPaths, running: int) -> None:
    """Start so many trials, as a session that was killed would leave them."""
    ledger = Ledger(config.model_copy(update={"sampler": "random"}), paths, read_frozen(paths).hash)
    for _ in range(running):
        record = ledger.take()
        append_event(paths.events(record.key), Event(time=record.number, event="start"))
        append_event(paths.events(record.key), Event(time=record.number, event="rung", step=14, metrics={COST: 5.0}))


def measure(config: StudyConfig, running: int, rounds: int, pause: float) -> Measured:
    """One size of study.

    Args:
        config: of a study that was filled.
        running: trials that run at once.
        rounds: how many trials start, have a rung, and end.
        pause: seconds between events. The threads beside the driver's own work then, too.

    Returns:
        Times of each kind of event, of opening and of closing; peak of resident memory in MB; points on the front.
    """
    logging.disable(logging.WARNING)
    paths, template = config.paths, trial_template(config)
    seconds: dict[str, Times] = {name: [] for name in ("open", "resume", "start", "rung", "end", "close")}
    start_running(config, paths, running)
    storage = open_storage(paths, None)
    rng = np.random.default_rng(1)
    with Lease(storage.engine, config.name, lost=lambda _: None) as lease:
        began = time.perf_counter(), time.thread_time()
        ledger = Ledger(config, paths, read_frozen(paths).hash, database=storage, confirm=lease.confirm)
        session = Session(config, ledger, template, lease)
        session._pages.request(session._so_far())
        session._tracking.request((ledger.records(), None))
        make = partial(ledger.trial, template)
        searcher = LedgerSearcher(ledger, make, session._patience(), session._may_start, session._changed)
        seconds["open"].append((time.perf_counter() - began[0], time.thread_time() - began[1]))
        names = [f"tune-{index}" for index in range(running)]
        for name in names:
            timed(partial(searcher.suggest, name), seconds["resume"])
        for index in range(rounds):
            ended, fresh = names.pop(0), f"tune-{running + index}"
            values = measurements(rng)
            report: dict[str, Any] = {**values, "step": 14, "resumed_from_step": -1, "last": False, "epoch": 1}
            report |= {"history": json.dumps([{"step": 7, "loss": 1.0}]), **dict.fromkeys(COSTS.values(), 5.0)}
            result = TrialResult(
                metrics=metrics_of(values),
                correct=answers(values, rng),
                queries={"tr": IMAGES, "ir": CAPTIONS},
                device_seconds=16,
                seconds={},
                steps=42,
                resumed_from_steps=[],
                temperature=0.06,
                hashes={},
                versions={},
            )
            attempt = Attempt(began=0, ended=1, devices=1, cause="complete")
            outcome = closing(attempt, Outcome(state="complete", result=result))
            timed(partial(searcher.rung, names[-1], report), seconds["rung"])
            time.sleep(pause)
            timed(partial(searcher.on_trial_complete, ended, outcome), seconds["end"])
            time.sleep(pause)
            timed(partial(searcher.suggest, fresh), seconds["start"])
            time.sleep(pause)
            names.append(fresh)
        timed(session.close, seconds["close"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return seconds, peak, len(json.loads(paths.front.read_text(encoding="utf-8")))


def quietly(config: StudyConfig, running: int, rounds: int, pause: float) -> Measured:
    """As `measure`, without what the study prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return measure(config, running, rounds, pause)


def one_size(objectives: int, finished: int, options: argparse.Namespace) -> Measured:
    """Fill a study, and measure it in a process of its own, whose memory is the driver's alone."""
    with tempfile.TemporaryDirectory() as folder:
        config = StudyConfig(
            name="s",
            studies_dir=Path(folder),
            recipes=RECIPES,
            objectives=tuple(Objective(metric=f"{target}/mr_r1") for target in TARGETS[:objectives]),
            budget=Budget(trials=1_000_000, plateau_trials=1_000_000),
        )
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            process.submit(fill, config, finished).result()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(quietly, config, options.running, options.rounds, options.pause).result()


def written(times: Times) -> str:
    """Milliseconds."""
    (median, busy), (most, _) = 1000 * np.median(times, axis=0), 1000 * np.percentile(times, 99, axis=0)
    return f"{median:.1f} (p99 {most:.1f}) ms, processor {busy:.1f}"


def per_event(found: dict[str, Times]) -> tuple[float, float]:
    """Milliseconds of an event, on the clock and of the processor: median over rounds of a start, a rung and an end."""
    rounds = np.mean([found[name] for name in EVENTS], axis=0)
    clock, busy = 1000 * np.median(rounds, axis=0)
    return float(clock), float(busy)


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finished", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--running", type=int, default=1_000)
    parser.add_argument("--objectives", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between events")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parser().parse_args(arguments)
    good = True
    for objectives in options.objectives:
        whole = []
        for finished in options.finished:
            found, resident, front = one_size(objectives, finished, options)
            print(f"{objectives} objectives, {finished} ended, {options.running} running, {front} on the front")
            for name, times in found.items():
                print(f"  {name:8}{written(times)}", flush=True)
            print(f"  peak resident {resident:.0f} MB", flush=True)
            whole.append(per_event(found))
            medians = [1000 * np.median(found[name], axis=0)[0] for name in EVENTS]
            good &= max(medians) <= MEDIAN_MS and resident <= RESIDENT_MB
        (clock, busy), ((closed, closed_busy),) = whole[-1], found["close"]
        growth = busy / whole[0][1]
        print(
            f"{objectives} objectives: {clock:.1f} ms an event, processor {busy:.1f}, "
            f"x{growth:.2f} of the smallest study; peak resident {resident:.0f} MB; "
            f"closing {closed:.1f} s, processor {closed_busy:.1f}\n",
            flush=True,
        )
        good &= growth <= GROWTH
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
