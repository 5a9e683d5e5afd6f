from __future__ import annotations

import fcntl
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dashboards.pareto_page import write_front_files
from study import track
from study.config import Budget, Objective, StudyConfig
from study.ledger import open_storage
from study.mlflow_store import TrackingError, _create_database, import_mlflow, metric_name, redacted
from study.records import (
    Event,
    Manifest,
    State,
    StudyPaths,
    TrialRecord,
    append_event,
    read_manifest,
    write_manifest,
)
from study.tracking import BackgroundProjection, Projection, default_uri, event_points, ui_command

OBJECTIVES = (Objective(metric="both/mr_r5"), Objective(metric="clean/mr_r5"))
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
        root.mkdir(parents=True, exist_ok=True)
        self.paths.config.write_text("name: study\n")

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
        history = [{"step": step - 1, "loss": 1 / step}, {"step": step, "loss": 0.9 / step}]
        self.event(number, "rung", step=step, metrics={"both/mr_r5": step / 100}, history=history)

    def end(self, number: int, robust: float, clean: float, state: State = "complete") -> None:
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
            "fingerprint": "f",
            "ended": self.time,
        }
        write_manifest(self.paths.manifest(record.key), Manifest.model_validate(manifest))
        self.state(number, state)
        self.write_pages()

    def write_pages(self) -> None:
        manifests = [read_manifest(self.paths.manifest(record.key)) for record in self.records]
        write_front_files(self.paths, [one for one in manifests if one is not None], OBJECTIVES, "study")

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
        ]
        for step in steps:
            step()
            yield


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all its tables, which takes seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    import_mlflow().MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def study(tmp_path: Path, empty_store: Path) -> FakeStudy:
    study = FakeStudy(tmp_path / "study")
    shutil.copy(empty_store, study.paths.mlflow_database)
    return study


@pytest.fixture
def other_uri(tmp_path: Path, empty_store: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'other.db')}"


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


def test_rebuilding_gives_what_live_updates_gave(study: FakeStudy, other_uri: str) -> None:
    live(study, projection(study))
    projection(study, other_uri).sync(study.records, "interrupted")
    assert dump(other_uri) == dump(default_uri(study.paths))


def test_a_run_tells_all_of_its_trial(study: FakeStudy) -> None:
    live(study, projection(study))
    runs = dump(default_uri(study.paths))
    assert set(runs) == {"study study", *(record.key for record in study.records)}
    first = runs["study-t00000-s0"]
    assert first["status"] == "FINISHED"
    assert first["params"] == {"temperature": "0.01", "epsilon": "0.0"}
    assert first["tags"]["recipe"] == "mat"
    assert first["tags"]["state"] == "complete"
    assert [point[0] for point in first["metrics"]["train/loss"]] == [4, 5, 9, 10]
    assert first["metrics"]["rung/both/mr_r5"][0] == (5, 1_000_003_000, 0.05)
    assert first["metrics"]["both/mr_r5.low"][0][2] == pytest.approx(0.2)
    assert first["metrics"]["cost/device_seconds"][0][2] == 7
    assert first["artifacts"] == ["manifest.json"]
    assert first["time"] == (1_000_001_000, 1_000_006_000)
    statuses = {key[-8:]: run["status"] for key, run in runs.items()}
    assert (statuses["00002-s0"], statuses["00003-s0"]) == ("KILLED", "FAILED")
    assert runs["study-t00002-s0"]["tags"]["reason"] == "diverged"
    whole = runs["study study"]
    assert whole["artifacts"] == ["front.json", "pareto.html", "study.yaml"]
    assert [point[0] for point in whole["metrics"]["hypervolume"]] == [1, 2, 3, 4, 5]
    assert [point[0] for point in whole["metrics"]["hypervolume_by_device_seconds"]] == [7, 14, 21, 28, 35]


def test_no_step_is_told_twice_when_an_attempt_repeats_it(study: FakeStudy) -> None:
    live(study, projection(study))
    points = dump(default_uri(study.paths))["study-t00001-s0"]["metrics"]
    assert [point[0] for point in points["rung/both/mr_r5"]] == [5, 10]
    assert [point[0] for point in points["train/loss"]] == [4, 5, 9, 10]


def test_the_first_value_of_a_step_stays() -> None:
    events = [
        Event(time=1, event="rung", step=5, metrics={"a": 1.0}, history=[{"step": 4, "loss": 2.0}]),
        Event(time=2, event="rung", step=5, metrics={"a": 7.0, "b": 3.0}, history=[{"step": 4, "loss": 8.0}]),
    ]
    expected = [("train/loss", 2.0, 1000, 4), ("rung/a", 1.0, 1000, 5), ("rung/b", 3.0, 2000, 5)]
    assert event_points(events) == expected


def test_a_driver_that_dies_again_and_again_leaves_no_double(study: FakeStudy, other_uri: str) -> None:
    for _ in study.life():
        projection(study).sync(study.records)
    projection(study).sync(study.records, "interrupted")
    projection(study, other_uri).sync(study.records, "interrupted")
    assert dump(default_uri(study.paths)) == dump(other_uri)


def test_a_stop_between_any_two_calls_leaves_no_double(
    study: FakeStudy, other_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in study.life():
        pass
    projection(study, other_uri).sync(study.records, "interrupted")
    client = import_mlflow().MlflowClient
    left = SimpleNamespace(calls=0)

    def limited(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            left.calls -= 1
            answer = call(*args, **kwargs)
            if left.calls < 0:  # done, but nobody heard of it
                raise OSError("the connection was lost")
            return answer

        return wrapper

    for name in CALLS:
        monkeypatch.setattr(client, name, limited(getattr(client, name)))
    same = projection(study)
    for left.calls in (0, 1, 2, 3, 5, 8):
        with pytest.raises(TrackingError, match="connection was lost"):
            (same if left.calls % 2 else projection(study)).sync(study.records, "interrupted")
    left.calls = 10_000
    same.sync(study.records, "interrupted")
    assert dump(default_uri(study.paths)) == dump(other_uri)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    client = import_mlflow().MlflowClient
    made: list[str] = []

    def counted(name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return call(*args, **kwargs)

        return wrapper

    for name in (*CALLS, "search_runs", "get_experiment_by_name"):
        monkeypatch.setattr(client, name, counted(name, getattr(client, name)))
    return made


def test_nothing_new_makes_no_call(study: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in study.life():
        pass
    one = projection(study)
    one.sync(study.records)
    made = count_calls(monkeypatch)
    one.sync(study.records)
    assert made == []
    study.rung(5, 10)
    one.sync(study.records)
    assert made == ["log_batch"]


def test_ended_trials_cost_a_later_process_nothing(study: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in study.life():
        pass
    study.end(5, 0.1, 0.1)
    projection(study).sync(study.records, "finished")
    made = count_calls(monkeypatch)
    projection(study).sync(study.records, "finished")
    # The study's own run reads its two metrics back and sends its three files again.
    assert sorted(set(made)) == [
        "get_experiment_by_name",
        "get_metric_history",
        "log_artifact",
        "search_runs",
    ]
    assert len(made) == 2 + 2 + 3


def on_front(study: FakeStudy) -> set[str]:
    return set(runs_of(default_uri(study.paths), "tags.pareto = 'true'"))


def test_the_filter_shows_exactly_the_front_as_it_moves(study: FakeStudy) -> None:
    one = projection(study)
    seen = []
    for robust, clean in ((0.3, 0.3), (0.5, 0.2), (0.5, 0.5), (0.1, 0.1), (0.1, 0.9)):
        number = study.propose()
        study.start(number)
        one.sync(study.records)
        study.end(number, robust, clean)
        one.sync(study.records)
        seen.append({int(name[7:12]) for name in on_front(study)})
    assert seen == [{0}, {0, 1}, {2}, {2}, {2, 4}]


def test_no_run_stays_running_and_a_resumed_one_runs_again(study: FakeStudy) -> None:
    uri = default_uri(study.paths)
    study.propose()
    study.propose()
    study.start(0)
    projection(study).sync(study.records)
    assert {run.info.status for run in runs_of(uri).values()} == {"RUNNING"}
    projection(study).sync(study.records, "interrupted")
    stopped = runs_of(uri)
    assert len(stopped) == 2, "a trial that never started has no run"
    assert {run.info.status for run in stopped.values()} == {"KILLED"}
    assert stopped["study-t00000-s0"].data.tags["state"] == "interrupted"
    study.state(0, "waiting")
    projection(study).sync(study.records)
    assert {run.info.status for run in runs_of(uri).values()} == {"RUNNING"}
    study.end(0, 0.5, 0.5)
    projection(study).sync(study.records, "finished")
    ended = runs_of(uri)
    assert {run.info.status for run in ended.values()} == {"FINISHED"}
    assert ended["study-t00000-s0"].info.end_time == round(study.time * 1000)


def test_an_interrupted_trial_that_proves_infeasible_gets_its_end(study: FakeStudy) -> None:
    study.start(study.propose())
    one = projection(study)
    one.sync(study.records, "interrupted")
    assert runs_of(default_uri(study.paths))["study-t00000-s0"].info.end_time is None
    study.end(0, 0, 0, "infeasible")
    one.sync(study.records, "interrupted")
    assert runs_of(default_uri(study.paths))["study-t00000-s0"].info.end_time == round(study.time * 1000)


def test_a_doubled_run_is_deleted_and_the_oldest_kept(study: FakeStudy) -> None:
    uri = default_uri(study.paths)
    study.start(study.propose())
    projection(study).sync(study.records)
    before = runs_of(uri)["study-t00000-s0"]
    client = client_of(uri)
    for _ in range(3):
        client.create_run(before.info.experiment_id, tags=before.data.tags)
    projection(study).sync(study.records)
    assert runs_of(uri)["study-t00000-s0"].info.run_id == before.info.run_id
    assert len(runs_of(uri)) == 2


def test_what_was_deleted_under_a_projection_comes_back(study: FakeStudy, other_uri: str) -> None:
    uri = default_uri(study.paths)
    one = projection(study)
    for _ in study.life():
        one.sync(study.records)
    client_of(uri).delete_run(runs_of(uri)["study-t00005-s0"].info.run_id)
    study.end(5, 0.1, 0.1)
    with pytest.raises(TrackingError):
        one.sync(study.records, "finished")
    one.sync(study.records, "finished")
    projection(study, other_uri).sync(study.records, "finished")
    assert dump(uri) == dump(other_uri)


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_an_experiment_that_cannot_be_gone_on_with_is_made_anew(
    study: FakeStudy, tmp_path: Path, other_uri: str, how: str
) -> None:
    live(study, projection(study))
    client = client_of(default_uri(study.paths))
    old = client.get_experiment_by_name("paretovl/study")
    if how == "deleted":
        client.delete_experiment(old.experiment_id)
    if how == "moved":
        study.paths.root.rename(tmp_path / "elsewhere")
        study.paths = StudyPaths(tmp_path / "elsewhere")
    projection(study, replace=how == "replaced").sync(study.records, "interrupted")
    projection(study, other_uri).sync(study.records, "interrupted")
    uri = default_uri(study.paths)
    assert client_of(uri).get_experiment_by_name("paretovl/study").experiment_id != old.experiment_id
    assert dump(uri) == dump(other_uri)
    for run in runs_of(uri).values():
        assert run.info.artifact_uri.startswith(study.paths.mlflow_artifacts.as_uri())


def test_two_studies_of_one_name_do_not_mix(study: FakeStudy, tmp_path: Path, other_uri: str) -> None:
    live(study, projection(study, other_uri))
    before = dump(other_uri)
    namesake = FakeStudy(tmp_path / "namesake")
    with pytest.raises(TrackingError, match="belongs to another study"):
        projection(namesake, other_uri)
    assert dump(other_uri) == before
    projection(namesake, other_uri, replace=True)
    assert dump(other_uri) == {}


def test_more_than_a_batch_is_sent_in_parts(study: FakeStudy) -> None:
    number = study.propose()
    params = {f"knob_{index}": index for index in range(150)}
    study.records[number] = replace(study.records[number], params=params)
    study.start(number)
    history = [{"step": step, "loss": float(step), "temperature": 0.1} for step in range(1100)]
    study.event(number, "rung", step=1100, history=history)
    projection(study).sync(study.records)
    run = dump(default_uri(study.paths))["study-t00000-s0"]
    assert len(run["params"]) == 150
    assert [point[0] for point in run["metrics"]["train/loss"]] == list(range(1100))
    assert len(run["metrics"]["train/temperature"]) == 1100


@pytest.mark.parametrize("name", ["both/mr_r5", "a@b(c)%", "/lead", "./x", "a//b", "a/../b", "x/", "..", "é β", ".a"])
def test_metric_names_are_legal(name: str) -> None:
    import_mlflow()
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(metric_name(f"rung/{name}"))
    _validate_metric_name(metric_name(f"{name}.low"))
    assert metric_name("both/mr_r5.low") == "both/mr_r5.low"


@pytest.mark.parametrize("answers", [False, True])
def test_an_unreachable_server_is_told_quickly(
    study: FakeStudy, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not answers:
            server.close()
        start = time.monotonic()
        with pytest.raises(TrackingError) as told:
            projection(study, f"http://me:hush@127.0.0.1:{port}")
    assert time.monotonic() - start < 8
    assert f"http://me:***@127.0.0.1:{port} failed" in str(told.value)
    assert "hush" not in str(told.value)
    assert "python -m study.track --name study" in str(told.value)


def test_an_unreachable_database_is_told_quickly(study: FakeStudy) -> None:
    start = time.monotonic()
    with pytest.raises(TrackingError, match=r"postgresql://me:\*\*\*@127.0.0.1:1/x failed") as told:
        projection(study, "postgresql://me:hush@127.0.0.1:1/x")
    assert time.monotonic() - start < 8
    assert "hush" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
        ("to https://me:p@ss/w@host/api and on", "to https://me:***@host/api and on"),
        ("postgresql+psycopg2://me:secret@db:5432/x", "postgresql+psycopg2://me:***@db:5432/x"),
        ("postgresql://db/x?user=me&password=secret&a=b", "postgresql://db/x?user=me&password=***&a=b"),
    ],
)
def test_passwords_are_not_shown(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_the_command_for_the_ui(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path / "a study")
    store = f"'sqlite:///{tmp_path}/a study/mlflow.db'"
    assert ui_command(None, paths) == f"uv run mlflow ui --backend-store-uri {store} --workers 1 --port 5000"
    assert ui_command("http://host:5000", paths) == "open http://host:5000"


class FakeProjection(Projection):
    """Counts syncs, and fails or waits when told to."""

    def __init__(self) -> None:
        self.synced: list[tuple[int, str | None]] = []
        self.failures = 0
        self.gate = threading.Event()
        self.gate.set()

    def sync(self, records: Sequence[Any], final: Any = None) -> None:
        self.gate.wait(10)
        if self.failures:
            self.failures -= 1
            raise TrackingError("down")
        self.synced.append((len(records), final))


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)


def background(fake: FakeProjection) -> BackgroundProjection:
    return BackgroundProjection(fake, interval_seconds=0.01, retry_seconds=0.01)


def test_requests_made_during_a_sync_become_one() -> None:
    fake = FakeProjection()
    fake.gate.clear()
    worker = background(fake)
    worker.request([1])
    wait_for(lambda: not worker._wanted.is_set())
    for count in range(2, 50):
        worker.request([1] * count)
    fake.gate.set()
    wait_for(lambda: len(fake.synced) == 2)
    worker.finish([1, 2, 3], "finished")
    assert fake.synced == [(1, None), (49, None), (3, "finished")]


def test_a_failure_is_kept_warned_of_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeProjection()
    fake.failures = 3
    worker = background(fake)
    worker.request([1])
    wait_for(lambda: fake.synced)
    assert worker.last_error is None
    assert [record.message for record in caplog.records] == ["down"]
    fake.failures = 1
    worker.finish([1], "interrupted")
    assert worker.last_error == "down"


def test_mlflow_says_nothing_by_itself(study: FakeStudy, capfd: pytest.CaptureFixture[str]) -> None:
    study.paths.mlflow_database.unlink()
    live(study, projection(study))
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def known_study(study: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> FakeStudy:
    config = StudyConfig(
        name="study", studies_dir=study.paths.root.parent, objectives=OBJECTIVES, budget=Budget(trials=5)
    )
    study.paths.config.write_text(yaml.safe_dump({"config": config.model_dump(mode="json")}, sort_keys=False))
    open_storage(study.paths, None)
    monkeypatch.setattr("study.ledger.read_records", lambda name, storage: study.records)
    for _ in study.life():
        pass
    study.end(5, 0.9, 0.9)
    return study


def run_track(study: FakeStudy, *arguments: str) -> int:
    return track.main(["--name", "study", "--studies-dir", str(study.paths.root.parent), *arguments])


def test_the_command_syncs_and_rebuilds(
    known_study: FakeStudy, other_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_track(known_study) == 0
    shown = capsys.readouterr().out
    assert "6 trials, 6 ended, 1 on the front; the study is finished" in shown
    assert ui_command(None, known_study.paths) in shown
    assert run_track(known_study, "--tracking-uri", other_uri) == 0
    first = dump(other_uri)
    assert first == dump(default_uri(known_study.paths))
    client = client_of(other_uri)
    client.set_tag(runs_of(other_uri)["study study"].info.run_id, "stray", "1")
    assert run_track(known_study, "--tracking-uri", other_uri, "--rebuild") == 0
    assert dump(other_uri) == first


def test_the_command_refuses_what_it_cannot_use(known_study: FakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    assert track.main(["--name", "other", "--studies-dir", str(known_study.paths.root.parent)]) == 2
    assert "there is no study at" in (told := capsys.readouterr().err)
    assert told.endswith(": study\n")
    with known_study.paths.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_track(known_study) == 2
        assert "is running" in capsys.readouterr().err
    assert run_track(known_study, "--tracking-uri", "nonsense://x") == 1
    assert "MLflow at nonsense://x failed" in capsys.readouterr().err


def test_a_study_with_something_left_to_do_is_interrupted(
    known_study: FakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    known_study.records = known_study.records[:-1]
    assert run_track(known_study) == 0
    assert "the study is interrupted" in capsys.readouterr().out


def test_store_whose_creation_was_cut_short(tmp_path: Path) -> None:
    part = tmp_path / "mlflow.db.part"
    part.write_bytes(b"half a database")
    _create_database(tmp_path / "mlflow.db")
    assert not part.exists()
    made = (tmp_path / "mlflow.db").read_bytes()
    assert made.startswith(b"SQLite format 3")
    _create_database(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == made
