"""A study that goes through a life without Ray, and what MLflow holds of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dashboards.pareto_page import write_front_files
from study.config import Objective
from study.paths import StudyPaths
from study.records import Event, Manifest, State, TrialRecord, append_event, read_manifest, write_manifest
from study.tracking.mlflow_store import import_mlflow
from study.tracking.projection import Projection
from trainables.config import Protocol

OBJECTIVES = (Objective(metric="both/mr_r5"), Objective(metric="clean/mr_r5"))
TRIES = [
    {"began": 9, "ended": 19, "devices": 1, "cause": "preempted"},
    {"began": 29, "ended": 39, "devices": 1, "cause": "complete"},
]
CALLS = (
    "create_run",
    "log_batch",
    "log_artifact",
    "set_tag",
    "update_run",
    "set_terminated",
    "get_metric_history",
)


class FakeStudy:
    """A study's files, written as a driver writes them; its clock ticks a second an event."""

    def __init__(self, root: Path) -> None:
        self.paths = StudyPaths(root)
        self.records: list[TrialRecord] = []
        self.time = 1_000_000.0
        self.fingerprint = "f"
        root.mkdir(parents=True, exist_ok=True)
        self.paths.config.write_text(f"name: study\nid: {root}\n")

    def event(self, number: int, kind: str, **fields: Any) -> None:
        self.time += 1
        event = Event.model_validate({"time": self.time, "event": kind, **fields})
        append_event(self.paths.events(self.records[number].key), event)

    def propose(self, recipe: str | None = None) -> int:
        number = len(self.records)
        params = {} if recipe else {"temperature": 0.01 * (number + 1)}
        self.records.append(TrialRecord(number, f"study-t{number:05d}-s0", "waiting", params, recipe))
        return number

    def state(self, number: int, state: State) -> None:
        self.records[number] = replace(self.records[number], state=state)

    def start(self, number: int) -> None:
        self.state(number, "running")
        self.event(number, "start")

    def rung(self, number: int, step: int) -> None:
        rows = ((step - 1, 1 / step), (step, 0.9 / step))
        history = [{"step": at, "time": self.time + at / 100, "loss": loss} for at, loss in rows]
        self.event(number, "rung", step=step, metrics={"both/mr_r5": step / 100}, history=history)

    def end(self, number: int, robust: float, clean: float, state: State = "complete") -> None:
        if state == "complete":
            self.event(number, "final", step=10, metrics={"both/mr_r5": robust, "clean/mr_r5": clean})
        self.event(number, "end", step=10, message=state)
        record = self.records[number]
        metrics = {
            name: {"value": value, "low": value - 0.1, "high": value + 0.1}
            for name, value in (("both/mr_r5", robust), ("clean/mr_r5", clean))
        }
        manifest = {
            "key": record.key,
            "number": number,
            "recipe": record.recipe,
            "params": record.params,
            "point": {"temperature": 0.01 * (number + 1), "epsilon": 0.0},
            "state": state,
            "reason": None if state == "complete" else "diverged",
            "metrics": metrics if state == "complete" else {},
            "cost": {"device_seconds": 7.0, "attempts": 1},
            "attempts": TRIES if number == 4 else [],
            "fingerprint": self.fingerprint,
            "ended": self.time,
        }
        write_manifest(self.paths.manifest(record.key), Manifest.model_validate(manifest))
        self.state(number, state)
        self.write_pages()

    def write_pages(self) -> None:
        manifests = [read_manifest(self.paths.manifest(record.key)) for record in self.records]
        write_front_files(self.paths, [one for one in manifests if one is not None], OBJECTIVES, "study", Protocol())

    def life(self) -> Iterator[None]:
        """A whole study with every kind of trial, one file written between yields."""
        steps = [
            lambda: self.propose("mat"),
            lambda: self.start(0),
            lambda: self.propose(),
            lambda: self.start(1),
            lambda: self.rung(0, 5),
            lambda: self.rung(1, 5),
            lambda: self.rung(0, 10),
            lambda: self.end(0, 0.3, 0.3),
            lambda: self.event(1, "resume", step=3),
            lambda: self.rung(1, 5),
            lambda: self.rung(1, 10),
            lambda: self.end(1, 0.5, 0.5),
            lambda: self.propose(),
            lambda: self.start(2),
            lambda: self.end(2, 0, 0, "infeasible"),
            lambda: self.propose(),
            lambda: self.start(3),
            lambda: self.end(3, 0, 0, "failed"),
            lambda: self.propose(),
            lambda: self.start(4),
            lambda: self.rung(4, 5),
            lambda: self.end(4, 0.2, 0.9),
            lambda: self.propose(),
            lambda: self.start(5),
            lambda: self.rung(5, 5),
            lambda: self.event(5, "attempt", attempt={"began": 9, "devices": 1}),
            lambda: self.event(5, "attempt", attempt=TRIES[0]),
        ]
        for step in steps:
            step()
            yield


def projection(study: FakeStudy, uri: str | None = None, **options: Any) -> Projection:
    return Projection(study.paths, uri, "study", OBJECTIVES, **options)


def client_of(uri: str) -> Any:
    return import_mlflow().MlflowClient(tracking_uri=uri)


def runs_of(uri: str, query: str = "") -> dict[str, Any]:
    client = client_of(uri)
    experiment = client.get_experiment_by_name("paretovl/study")
    runs = list(client.search_runs([experiment.experiment_id], query))
    named = {run.info.run_name: run for run in runs}
    assert len(named) == len(runs), "two runs of one trial"
    return named


def dump(uri: str) -> dict[str, Any]:
    """All that MLflow holds of the study, without its own ids."""
    client = client_of(uri)
    return {
        name: {
            "status": run.info.status,
            "time": (run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
            "metrics": {
                key: sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key))
                for key in run.data.metrics
            },
            "artifacts": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        }
        for name, run in runs_of(uri).items()
    }


def live(study: FakeStudy, projection: Projection) -> None:
    for _ in study.life():
        projection.sync(study.records)
    projection.sync(study.records, "interrupted")
