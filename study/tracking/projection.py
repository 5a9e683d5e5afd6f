"""MLflow as a projection of the study: charts, tags and tables that can be deleted and rebuilt at any time.

What a run should look like follows from the ledger's records, the trials' logs and their manifests alone
(`trial_run`, `study_run`: pure). `Projection.sync` brings MLflow there and sends only what is missing. So a
live update, going on after a crash and a rebuild from nothing are the same call.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from study.config import Objective
from study.front.estimates import Members
from study.front.hypervolume import History, Row
from study.ledger.attempts import attempts_of, causes, lost_seconds
from study.paths import StudyPaths, sqlite_url
from study.records import Event, Manifest, TrialRecord, read_events, read_manifest, study_id
from study.tracking.mlflow_store import (
    KIND_TAG,
    RERUN_TAG,
    STUDY,
    TRIAL_TAG,
    ExperimentStore,
    MetricPoint,
    RunState,
    Stamp,
    TrackingError,
    metric_name,
    milliseconds,
    open_experiment,
)
from trainables.errors import redacted
from trainables.files import Location

Final = Literal["finished", "interrupted"]
"""How a driver leaves the study: the budget is spent, or somebody or something stopped it."""

STATUS = {"complete": "FINISHED", "stopped": "KILLED", "infeasible": "KILLED", "failed": "FAILED"}
"""MLflow's run status of an ended trial; the tag `state` tells early stopping from what cannot be used."""


def event_points(events: Iterable[Event]) -> list[MetricPoint]:
    """The metric points of a trial's log: training history as `train/...`, small evaluations as `rung/...`.

    The final evaluation is none of them: `manifest_points` has it, under names of its own, because what few images
    under a weak attack say does not compare with it.

    A resumed attempt repeats the steps after its checkpoint. The first value of a step stays: MLflow can add
    points but not take them back, and with equal randomness the repeated ones tell nothing new.
    """
    points: dict[tuple[str, int], MetricPoint] = {}

    def add(name: str, value: float, time: float, step: int) -> None:
        key = metric_name(name)
        points.setdefault((key, step), MetricPoint(key, float(value), milliseconds(time), step))

    for event in events:
        for row in event.history:
            step = int(row.get("step", event.step))
            for name, value in row.items():
                if name not in ("step", "time"):
                    add(f"train/{name}", value, row.get("time", event.time), step)
        if event.event == "rung":
            for name, value in event.metrics.items():
                add(f"rung/{name}", value, event.time, event.step)
    return list(points.values())


def manifest_points(manifest: Manifest) -> list[MetricPoint]:
    """The final measurements and costs. They are single numbers, so all stand at step 0."""
    values: dict[str, float] = {}
    for name, metric in manifest.metrics.items():
        values |= {name: metric.value, f"{name}.low": metric.low, f"{name}.high": metric.high}
    values |= {f"cost/{name}": cost for name, cost in manifest.cost.items() if isinstance(cost, int | float)}
    if manifest.attempts:
        values |= {"cost/attempts": len(manifest.attempts), "cost/lost_device_seconds": lost_seconds(manifest.attempts)}
    time = milliseconds(manifest.ended)
    return [MetricPoint(metric_name(name), float(value), time, 0) for name, value in values.items()]


def trial_run(
    record: TrialRecord,
    manifest: Manifest | None,
    events: Sequence[Event],
    on_front: bool,
    certified: bool | None,
    files: Mapping[Location, Stamp],
    final: Final | None = None,
) -> RunState | None:
    """What a trial's run should look like; None before the trial has started.

    Args:
        record: the trial in the ledger.
        manifest: once it ended; its state goes before the ledger's, which is told after it.
        events: the trial's log.
        on_front: whether it is on the front now.
        certified: whether it stayed on the front when it was measured again; None where it was not.
        files: its artifacts.
        final: None while a driver works on the study. Afterwards no run is left running.
    """
    if manifest is None and not events:
        return None
    state = manifest.state if manifest else record.state
    status = STATUS.get(state, "RUNNING" if final is None else "KILLED")
    tags = {KIND_TAG: "trial", TRIAL_TAG: record.key, "trial": str(record.number)}
    if record.reruns:
        tags[RERUN_TAG] = str(record.reruns)
    tags["state"] = state if final is None or state in STATUS else "interrupted"
    if record.recipe is not None:
        tags["recipe"] = record.recipe
    if state == "complete":
        tags["pareto"] = "true" if on_front else "false"
    if certified is not None:
        tags["certified"] = "true" if certified else "false"
    if ended_by := causes(manifest.attempts if manifest else attempts_of(events)):
        tags["attempts"] = ", ".join(f"{count} {cause}" for cause, count in sorted(ended_by.items()))
    params = dict(record.params)
    points = event_points(events)
    ended = events[-1].time if events and state in STATUS else None
    if manifest is not None:
        params = {**manifest.point, **params}
        points += manifest_points(manifest)
        ended = manifest.ended
        if manifest.reason:
            tags["reason"] = manifest.reason[:500]
    return RunState(
        name=record.key,
        status=status,
        started=events[0].time if events else ended or 0.0,
        ended=ended,
        params={metric_name(name): str(value)[:500] for name, value in params.items()},
        tags=tags,
        points=points,
        artifacts=dict(files),
        sealed=manifest is not None,
    )


def study_run(
    name: str,
    objectives: Sequence[Objective],
    history: Sequence[Row],
    files: Mapping[Location, Stamp],
    started: float,
    final: Final | None = None,
    reruns: int = 0,
) -> RunState:
    """What the study's own run should look like: hypervolume against ended trials and device-seconds.

    Args:
        name: of the study.
        objectives: what it optimises.
        history: `study.front.hypervolume.History`'s rows.
        files: its artifacts.
        started: when the first trial did.
        final: see `trial_run`.
        reruns: of all trials.
    """
    points = []
    for ended, count, device_seconds, share in history:
        time = milliseconds(ended)
        points.append(MetricPoint("hypervolume", share, time, count))
        points.append(MetricPoint("hypervolume_by_device_seconds", share, time, int(device_seconds)))
    wanted = ", ".join(f"{objective.direction} {objective.metric}" for objective in objectives)
    return RunState(
        name=f"study {name}",
        status={None: "RUNNING", "finished": "FINISHED", "interrupted": "KILLED"}[final],
        started=started,
        ended=history[-1][0] if history and final == "finished" else None,
        params={"objectives": wanted},
        tags={KIND_TAG: "study"} | ({RERUN_TAG: str(reruns)} if reruns else {}),
        points=points,
        artifacts=dict(files),
    )


def default_uri(paths: StudyPaths) -> str:
    """The SQLite store in the study's folder."""
    return sqlite_url(paths.mlflow_database)


def ui_command(uri: str | None, paths: StudyPaths) -> str:
    """What to type to look at the study; a password in the URI has to be filled in."""
    uri = uri or default_uri(paths)
    if uri.startswith(("http://", "https://")):
        return f"open {redacted(uri)}"
    return f"uv run mlflow ui --backend-store-uri {shlex.quote(redacted(uri))} --workers 1 --port 5000"


class Projection:
    """MLflow's view of one study: an experiment with one run for the study and one for each started trial."""

    def __init__(
        self,
        paths: StudyPaths,
        uri: str | None,
        study_name: str,
        objectives: Sequence[Objective],
        replace: bool = False,
    ) -> None:
        """Connect, if a URI was given; the default store is opened by the first `sync`.

        Args:
            paths: of the study.
            uri: MLflow tracking URI; None: SQLite in the study's folder.
            study_name: names the experiment `paretovl/<study_name>`.
            objectives: what the front is about.
            replace: delete what an experiment of this name holds, whosever it is, and begin anew.

        Raises:
            TrackingError: the server does not answer (told within about 10 seconds), or the experiment is
                another study's.
        """
        self.paths = paths
        self.uri = uri or default_uri(paths)
        self.study_name = study_name
        self.experiment = f"paretovl/{study_name}"
        self.objectives = tuple(objectives)
        self._own_store = uri is None
        self._replace = replace
        self._store: ExperimentStore | None = None
        self._started: float | None = None
        self._brought: dict[str, Any] = {}
        self._ended: set[str] = set()
        self._members = Members(objectives)
        self._on_front: frozenset[str] = frozenset()
        self._certified: dict[str, bool] = {}
        self._history = History(objectives)
        if uri is not None:
            self._guarded(self._connect)

    def sync(self, records: Sequence[TrialRecord], final: Final | None = None) -> None:
        """Bring MLflow to the state of the records, logs and manifests; nothing new makes no call.

        Args:
            records: all trials of the ledger.
            final: None while a driver works on the study, else how it was left. No run stays RUNNING then;
                the next `sync` without it sets the runs of the trials that go on to RUNNING again.

        Raises:
            TrackingError: what was not sent is sent by the next call.
        """
        self._guarded(lambda: self._sync(records, final))

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except TrackingError:
            self._store = None
            raise
        except Exception as error:  # each kind of store raises its own
            # Whatever is known of the store may be wrong now: read it again next time.
            self._store = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise TrackingError(
                f"MLflow at {redacted(self.uri)} failed: {redacted(reason[0])[:300]}. Check that it runs and "
                "that tracking.uri is right, with its password, which is not kept. Nothing is lost: the study keeps "
                f"its own files, and `python -m study.track --name {self.study_name}` brings MLflow up to date later."
            ) from error

    def _connect(self) -> ExperimentStore:
        if self._store is None:
            self._store = open_experiment(
                self.uri,
                self.experiment,
                str(study_id(self.paths)),
                self.paths.mlflow_artifacts,
                movable=self._own_store,
                replace=self._replace,
            )
            self._replace = False
            self._brought.clear()
        return self._store

    def _sync(self, records: Sequence[TrialRecord], final: Final | None) -> None:
        store = self._connect()
        self._read_manifests(records)
        self._read_certified()
        reruns = sum(record.reruns for record in records)
        if self._started is not None:
            self._bring_study(store, self._started, reruns, final)
        for record in records:
            stamp = self._stamp(record, final)
            if self._brought.get(record.key) == stamp:
                continue
            state = self._trial(record, final)
            if state is not None:
                if self._started is None:
                    self._started = state.started
                    self._bring_study(store, self._started, reruns, final)
                store.bring(record.key, state)
            self._brought[record.key] = stamp

    def _bring_study(self, store: ExperimentStore, started: float, reruns: int, final: Final | None) -> None:
        pages = _stamped([self.paths.pareto_page, self.paths.front, self.paths.certified_front, self.paths.config])
        rows = self._history.rows
        store.bring(STUDY, study_run(self.study_name, self.objectives, rows, pages, started, final, reruns))

    def _read_manifests(self, records: Sequence[TrialRecord]) -> None:
        """Read the new ones; they never change."""
        missing = [record.key for record in records if record.key not in self._ended]
        read = (read_manifest(self.paths.manifest(key)) for key in missing)
        new = [manifest for manifest in read if manifest is not None]
        for manifest in sorted(new, key=lambda manifest: (manifest.ended, manifest.key)):
            self._ended.add(manifest.key)
            self._members.add(manifest)
            self._history.add(manifest)
        if new:
            self._on_front = self._members.keys

    def _read_certified(self) -> None:
        path = self.paths.certified_front
        decided = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"front": [], "left": []}
        self._certified = {item["key"]: name == "front" for name in ("front", "left") for item in decided[name]}

    def _stamp(self, record: TrialRecord, final: Final | None) -> Any:
        """Everything that the trial's run depends on."""
        if record.key in self._ended:
            return record.key in self._on_front, self._certified.get(record.key)
        return record.state, final, _stamped([self.paths.events(record.key)])

    def _trial(self, record: TrialRecord, final: Final | None) -> RunState | None:
        key = record.key
        manifest = read_manifest(self.paths.manifest(key)) if key in self._ended else None
        files = _stamped([self.paths.manifest(key)] if manifest else [])
        events = list(read_events(self.paths.events(key)))
        return trial_run(record, manifest, events, key in self._on_front, self._certified.get(key), files, final)


def _stamped(paths: Iterable[Location]) -> dict[Location, Stamp]:
    """Those of the files that are there."""
    stats = {path: path.stat() for path in paths if path.exists()}
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}
