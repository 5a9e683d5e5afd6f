"""The only place that talks to MLflow: opens a study's experiment and brings its runs to a wanted state.

Plain `MlflowClient` calls with everything named, never the fluent API, whose active run is global state.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from study.paths import sqlite_url
from trainables.errors import redacted
from trainables.files import Location, local_copy

Stamp = tuple[int, int]
"""Of a file: changes when its content does."""

STUDY = ""
"""Stands for the study's own run where trials go by their key."""

KIND_TAG, TRIAL_TAG, STUDY_TAG = "paretovl.kind", "paretovl.trial", "paretovl.study"

RERUN_TAG = "paretovl.rerun"
"""How often the trial was begun again after it had ended; each time has a run of its own, the last one stays."""

POINTS_TAG = "paretovl.points"
"""Set last on the run of an ended trial: all of so many metric points and the manifest are stored."""

TIMEOUT_SECONDS = 10
"""How long a server may take to answer. Nothing is retried here: the next sync is the retry."""


class TrackingError(Exception):
    """MLflow cannot be reached or refuses; its text is the whole message. The study itself goes on."""


class MetricPoint(NamedTuple):
    """One value of a metric; MLflow keeps points that differ in anything as separate points."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(frozen=True)
class RunState:
    """What a run should look like.

    `points` only ever grows. `ended` is None while the run may go on. `sealed`: no point, param or artifact
    will be added.
    """

    name: str
    status: str
    started: float
    ended: float | None
    params: dict[str, str]
    tags: dict[str, str]
    points: list[MetricPoint]
    artifacts: dict[Location, Stamp]
    sealed: bool = False


def metric_name(name: str) -> str:
    """The nearest name that MLflow accepts.

    Example:
        >>> metric_name("both/mr_r@5 (%)")
        'both/mr_r_5 ___'
    """
    parts = re.sub(r"[^\w.\- /]", "_", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")).lstrip(".") or "_"


def milliseconds(seconds: float) -> int:
    """MLflow's unit of time."""
    return round(1000 * seconds)


def import_mlflow() -> Any:
    """MLflow, quiet and with patience that suits a background task. Takes seconds the first time."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT_SECONDS),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback of what it raises as well
    return mlflow


def open_experiment(
    uri: str, name: str, study_id: str, artifacts: Location, *, movable: bool = False, replace: bool = False
) -> ExperimentStore:
    """The study's experiment, created where there is none.

    Args:
        uri: MLflow tracking URI.
        name: of the experiment.
        study_id: kept in a tag of the experiment, so that two studies of one name never mix their runs.
        artifacts: folder for artifacts where no server keeps them.
        movable: the store moves with the study's folder; then its artifacts are elsewhere, and it is redone.
        replace: begin anew, whosever the present experiment is.

    Raises:
        TrackingError: the experiment belongs to another study.
    """
    _check_database(uri)
    if movable:
        _create_database(Path(unquote(uri.removeprefix("sqlite:///"))))
    client = import_mlflow().MlflowClient(tracking_uri=uri)
    location = None if uri.startswith(("http://", "https://")) else artifacts.resolve().as_uri()
    if location is not None:
        _check_artifacts(location)
    found = client.get_experiment_by_name(name)
    if found is not None:
        moved = movable and found.artifact_location != location
        if found.lifecycle_stage == "deleted" or moved or replace:
            _retire(client, found)
            found = None
        elif found.tags.get(STUDY_TAG) != study_id:
            raise TrackingError(
                f"the MLflow experiment {name!r} at {redacted(uri)} belongs to another study folder. Give "
                "this study another --name, or replace what is there by `python -m study.track --rebuild`."
            )
    if found is not None:
        return ExperimentStore(client, found.experiment_id)
    note = "The front: filter for `tags.pareto = 'true'`. Its page is an artifact of the run of the study."
    tags = {STUDY_TAG: study_id, "mlflow.note.content": note}
    return ExperimentStore(client, client.create_experiment(name, artifact_location=location, tags=tags))


def _check_artifacts(location: str) -> None:
    """Tell at once where MLflow would find out with the first artifact."""
    library = {"s3": "boto3", "gs": "google.cloud.storage"}.get(location.partition("://")[0])
    if library is None:
        return
    try:
        importlib.import_module(library)
    except ImportError:
        raise TrackingError(
            f"MLflow needs {library} to put artifacts to {location}: install it, or give http(s):// of an MLflow server"
        ) from None


def _create_database(path: Path) -> None:
    """Make the SQLite store under another name first: MLflow cannot use one whose creation was cut short."""
    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    import_mlflow().MlflowClient(tracking_uri=sqlite_url(part)).search_experiments(max_results=1)
    part.replace(path)


def _check_database(uri: str) -> None:
    """Fail at once where MLflow would try for minutes: unreachable, wrong password, driver not installed."""
    if not uri.startswith(("postgresql", "mysql")):
        return
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": TIMEOUT_SECONDS})
    engine.connect().close()
    engine.dispose()


def _retire(client: Any, experiment: Any) -> None:
    """Delete the experiment and free its name. It stays in MLflow's trash until `mlflow gc`."""
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    client.rename_experiment(experiment.experiment_id, f"{experiment.name} (replaced {experiment.experiment_id})")
    client.delete_experiment(experiment.experiment_id)


@dataclass
class _Run:
    """What MLflow holds of a run, as far as this process knows."""

    run_id: str
    status: str
    ended_ms: int | None
    params: set[str]
    tags: dict[str, str]
    metrics: set[str] = field(default_factory=set)
    points: set[tuple[str, int]] | None = None
    artifacts: dict[Location, Stamp] = field(default_factory=dict)
    state: RunState | None = None


class ExperimentStore:
    """The runs of one experiment."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._runs: dict[str, _Run] = {}
        for run in list(self._stored_runs()):  # first all pages, for deleting shifts them
            key = run.data.tags.get(TRIAL_TAG, STUDY if run.data.tags.get(KIND_TAG) == "study" else None)
            if key is None:
                continue
            if key in self._runs:
                # Created twice because an answer got lost; the oldest comes first.
                client.delete_run(run.info.run_id)
                continue
            self._runs[key] = _Run(
                run_id=run.info.run_id,
                status=run.info.status,
                ended_ms=run.info.end_time,
                params=set(run.data.params),
                tags=dict(run.data.tags),
                metrics=set(run.data.metrics),
            )

    def _stored_runs(self) -> Iterable[Any]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def bring(self, key: str, state: RunState) -> None:
        """Send what the run lacks of `state`."""
        run = self._runs.get(key)
        if run is not None and run.tags.get(RERUN_TAG) != state.tags.get(RERUN_TAG):
            self._client.delete_run(run.run_id)  # of what the trial was before: points cannot be taken back
            run = None
        run = run or self._create(key, state)
        if run.state == state:
            return
        sealed = {POINTS_TAG: str(len(state.points))} if state.sealed else {}
        stored = bool(sealed) and run.tags.get(POINTS_TAG) == sealed[POINTS_TAG]
        self._log(run, state, [] if stored else self._missing_points(run, state.points))
        if not stored:
            for path, stamp in state.artifacts.items():
                if run.artifacts.get(path) != stamp:
                    with local_copy(path) as copy:
                        self._client.log_artifact(run.run_id, str(copy))
                    run.artifacts[path] = stamp
        self._set_status(run, state)
        if not stored and sealed:
            self._client.set_tag(run.run_id, POINTS_TAG, sealed[POINTS_TAG])
            run.tags |= sealed
        run.state = None if state.sealed else state
        if state.sealed:  # there may be many
            run.points = None

    def _create(self, key: str, state: RunState) -> _Run:
        started = milliseconds(state.started)
        created = self._client.create_run(self._experiment_id, start_time=started, tags=state.tags, run_name=state.name)
        run = _Run(created.info.run_id, created.info.status, None, set(), dict(state.tags), points=set())
        self._runs[key] = run
        return run

    def _missing_points(self, run: _Run, points: Sequence[MetricPoint]) -> list[MetricPoint]:
        if run.points is None:
            run.points = {
                (metric.key, metric.step)
                for name in run.metrics
                for metric in self._client.get_metric_history(run.run_id, name)
            }
        missing: dict[tuple[str, int], MetricPoint] = {}
        for point in points:
            if (point.key, point.step) not in run.points:
                missing.setdefault((point.key, point.step), point)
        return list(missing.values())

    def _log(self, run: _Run, state: RunState, points: Sequence[MetricPoint]) -> None:
        """Send points, params and tags in few calls; MLflow takes 1000 in all, 100 params and 100 tags."""
        from mlflow.entities import Metric, Param, RunTag

        params = {name: value for name, value in state.params.items() if name not in run.params}
        tags = {name: value for name, value in state.tags.items() if run.tags.get(name) != value}
        calls = max(math.ceil(len(points) / 800), math.ceil(len(params) / 100), math.ceil(len(tags) / 100))
        for call in range(calls):
            some_points = points[800 * call : 800 * (call + 1)]
            some_params = list(params.items())[100 * call : 100 * (call + 1)]
            some_tags = list(tags.items())[100 * call : 100 * (call + 1)]
            self._client.log_batch(
                run.run_id,
                metrics=[Metric(*point) for point in some_points],
                params=[Param(*pair) for pair in some_params],
                tags=[RunTag(*pair) for pair in some_tags],
            )
            if run.points is not None:
                run.points |= {(point.key, point.step) for point in some_points}
            run.params |= dict(some_params).keys()
            run.tags |= dict(some_tags)

    def _set_status(self, run: _Run, state: RunState) -> None:
        ended = None if state.ended is None else milliseconds(state.ended)
        if (run.status, run.ended_ms) == (state.status, ended):
            return
        if ended is None:
            # `set_terminated` would make up an end; a run that may go on has none.
            self._client.update_run(run.run_id, status=state.status)
        else:
            self._client.set_terminated(run.run_id, state.status, ended)
        run.status, run.ended_ms = state.status, ended
