"""MLflow as a projection: rebuilt equals live, and nothing is lost or doubled on the way."""

from __future__ import annotations

import socket
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tracked import CALLS, FakeStudy, client_of, dump, live, projection, runs_of

from study.paths import StudyPaths
from study.records import Event
from study.tracking.mlflow_store import TrackingError, _create_database, import_mlflow, metric_name
from study.tracking.projection import default_uri, event_points, ui_command
from trainables.errors import redacted


def test_rebuilding_gives_what_live_updates_gave(study: FakeStudy, other_uri: str) -> None:
    live(study, projection(study))
    projection(study, other_uri).sync(study.records, "interrupted")
    assert dump(other_uri) == dump(default_uri(study.paths))


def test_a_trial_that_runs_again_leaves_nothing_of_what_it_was(study: FakeStudy, other_uri: str) -> None:
    live(study, projection(study))
    study.paths.manifest(study.records[1].key).parent.rename(study.paths.root / "aside")
    study.records[1] = replace(study.records[1], state="running", reruns=1)
    again = projection(study)
    study.start(1)
    again.sync(study.records)
    assert dump(default_uri(study.paths))["study-t00001-s0"]["status"] == "RUNNING"
    study.end(1, 0.25, 0.35)
    again.sync(study.records, "interrupted")
    projection(study, other_uri).sync(study.records, "interrupted")
    told = dump(default_uri(study.paths))
    assert told == dump(other_uri)
    assert [value for *_, value in told["study-t00001-s0"]["metrics"]["both/mr_r5"]] == [0.25]
    assert "train/loss" not in told["study-t00001-s0"]["metrics"]


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
    assert first["time"] == (1_000_001_000, 1_000_007_000)
    statuses = {key[-8:]: run["status"] for key, run in runs.items()}
    assert (statuses["00002-s0"], statuses["00003-s0"]) == ("KILLED", "FAILED")
    assert runs["study-t00002-s0"]["tags"]["reason"] == "diverged"
    tried = runs["study-t00004-s0"]
    assert tried["tags"]["attempts"] == "1 complete, 1 preempted"
    assert tried["metrics"]["cost/attempts"][0][2] == 2
    assert tried["metrics"]["cost/lost_device_seconds"][0][2] == 10
    assert runs["study-t00005-s0"]["tags"]["attempts"] == "1 preempted"
    whole = runs["study study"]
    assert whole["artifacts"] == ["front.json", "pareto.html", "study.yaml"]
    assert [point[0] for point in whole["metrics"]["hypervolume"]] == [1, 2, 3, 4, 5]
    assert [point[0] for point in whole["metrics"]["hypervolume_by_device_seconds"]] == [7, 14, 21, 28, 35]


def test_no_step_is_told_twice_when_an_attempt_repeats_it(study: FakeStudy) -> None:
    live(study, projection(study))
    points = dump(default_uri(study.paths))["study-t00001-s0"]["metrics"]
    assert [point[0] for point in points["rung/both/mr_r5"]] == [5, 10]
    assert [point[0] for point in points["train/loss"]] == [4, 5, 9, 10]


def test_rungs_and_the_final_evaluation_never_share_a_metric(study: FakeStudy) -> None:
    live(study, projection(study))
    metrics = dump(default_uri(study.paths))["study-t00000-s0"]["metrics"]
    assert [(step, value) for step, _, value in metrics["rung/both/mr_r5"]] == [(5, 0.05), (10, 0.1)]
    assert [(step, value) for step, _, value in metrics["both/mr_r5"]] == [(0, 0.3)]
    assert "rung/clean/mr_r5" not in metrics, "this was measured at the end only"


def test_the_time_of_a_training_step_is_a_time_and_no_metric() -> None:
    rows = [{"step": 4, "time": 1234.5, "loss": 2.0}, {"step": 5, "loss": 1.0}]
    events = [Event(time=2000, event="rung", step=5, history=rows)]
    assert event_points(events) == [("train/loss", 2.0, 1_234_500, 4), ("train/loss", 1.0, 2_000_000, 5)]


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


def test_mlflow_says_nothing_by_itself(study: FakeStudy, capfd: pytest.CaptureFixture[str]) -> None:
    study.paths.mlflow_database.unlink()
    live(study, projection(study))
    assert capfd.readouterr() == ("", "")
    with sqlite3.connect(study.paths.mlflow_database) as database:
        database.execute("DROP TABLE metrics")
    with pytest.raises(TrackingError, match="no such table: metrics"):
        live(study, projection(study))
    assert capfd.readouterr() == ("", ""), "whoever catches it tells it"


def test_store_whose_creation_was_cut_short(tmp_path: Path) -> None:
    part = tmp_path / "mlflow.db.part"
    part.write_bytes(b"half a database")
    _create_database(tmp_path / "mlflow.db")
    assert not part.exists()
    made = (tmp_path / "mlflow.db").read_bytes()
    assert made.startswith(b"SQLite format 3")
    _create_database(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == made
