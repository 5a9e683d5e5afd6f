"""One contract for files on a disk and objects in a bucket; S3 is moto's server on loopback."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest

from study.records import Event, append_event, read_events, write_atomically, write_if_changed
from tests.s3_server import S3Server
from trainables.files import (
    Location,
    UrlPath,
    fetch,
    filled,
    local_copy,
    location,
    move,
    opened,
    ray_storage,
    refuse_unusable,
    remove_tree,
)
from trainables.object_storage import StorageAway


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "disk":
        return tmp_path / "studies"
    return request.getfixturevalue("bucket") / "studies"


def put(path: Location, text: str = "x") -> Location:
    write_atomically(path, text)
    return path


def test_what_is_written_is_read(folder: Location) -> None:
    path = folder / "a" / "front.json"
    assert not path.exists()
    assert not folder.is_dir()
    with pytest.raises(FileNotFoundError) as missing:
        path.read_bytes()
    assert missing.value.filename == str(path)
    put(path, "één")
    assert path.read_text(encoding="utf-8") == "één"
    put(path, "two")
    assert path.read_bytes() == b"two"
    assert (path.exists(), path.is_file(), path.is_dir()) == (True, True, False)
    assert (folder.exists(), folder.is_file(), folder.is_dir()) == (True, False, True)
    assert path.stat().st_size == 3
    assert abs(path.stat().st_mtime_ns / 1e9 - time.time()) < 60
    path.unlink()
    path.unlink(missing_ok=True)
    assert not path.exists()


def test_an_equal_write_leaves_the_time_alone(folder: Location) -> None:
    path = put(folder / "page.html")
    before = path.stat().st_mtime_ns
    time.sleep(1.1)  # S3's times are whole seconds
    write_if_changed(path, "x")
    assert path.stat().st_mtime_ns == before
    write_if_changed(path, "y")
    assert path.read_bytes() == b"y"


def test_names_are_those_of_paths(folder: Location) -> None:
    path = folder / "certified" / "q-t00001-s0.json"
    assert (path.name, path.stem, path.suffix) == ("q-t00001-s0.json", "q-t00001-s0", ".json")
    assert path.parent == folder / "certified"
    assert folder in path.parents
    assert path.with_suffix("") == folder / "certified" / "q-t00001-s0"
    assert path.with_name("x") == folder / "certified" / "x"
    assert str(path) == f"{folder}/certified/q-t00001-s0.json"
    assert len({path, folder / "certified" / "q-t00001-s0.json"}) == 1
    assert pickle.loads(pickle.dumps(path)) == path


def test_what_is_below_is_found(folder: Location) -> None:
    assert list(folder.glob("*/study.yaml")) == []
    for name in ("s/study.yaml", "s/trials/b/manifest.json", "s/trials/a/manifest.json", "s/trials/a/events.jsonl"):
        put(folder / name)
    put(folder / "s/runs/a/checkpoint_1/model/trial.json")

    def found(start: Location, pattern: str) -> list[str]:
        return sorted(str(path).removeprefix(f"{folder}/") for path in start.glob(pattern))

    assert found(folder / "s", "trials/*/manifest.json") == ["s/trials/a/manifest.json", "s/trials/b/manifest.json"]
    assert found(folder, "*/study.yaml") == ["s/study.yaml"]
    assert found(folder / "s" / "trials", "*") == ["s/trials/a", "s/trials/b"]
    assert found(folder / "s" / "runs" / "a", "**/trial.json") == ["s/runs/a/checkpoint_1/model/trial.json"]
    assert sorted(path.name for path in (folder / "s").iterdir()) == ["runs", "study.yaml", "trials"]


def test_logs_grow_line_by_line(folder: Location) -> None:
    log = folder / "trials" / "a" / "events.jsonl"
    assert list(read_events(log)) == []
    events = [Event(time=float(step), event="rung", step=step) for step in range(3)]
    for event in events:
        append_event(log, event)
    assert list(read_events(log)) == events


def test_folders_are_moved_and_removed_whole(folder: Location) -> None:
    put(folder / "runs" / "a" / "checkpoint" / "state.json", "1")
    put(folder / "runs" / "ab" / "state.json", "2")
    put(folder / "a.json", "3")
    aside = folder / "set_aside" / "a" / "1"
    aside.mkdir(parents=True)
    move(folder / "runs" / "a", aside / "run")
    move(folder / "a.json", aside / "a.json")
    assert not (folder / "runs" / "a").exists()
    assert not (folder / "a.json").exists()
    assert (aside / "run" / "checkpoint" / "state.json").read_bytes() == b"1"
    assert (aside / "a.json").read_bytes() == b"3"
    remove_tree(aside)
    remove_tree(aside)
    assert not (aside / "run").exists()
    assert (folder / "runs" / "ab" / "state.json").read_bytes() == b"2"


def test_copies_for_what_needs_a_disk(folder: Location, tmp_path: Path) -> None:
    with filled(folder / "export") as disk:
        (disk / "details").mkdir()
        (disk / "trials.csv").write_text("a")
        (disk / "details" / "b.csv").write_text("b")
    with local_copy(folder / "export") as copy:
        assert copy.name == "export"
        assert (copy / "details" / "b.csv").read_text() == "b"
    with local_copy(folder / "export" / "trials.csv") as copy:
        assert (copy.name, copy.read_text()) == ("trials.csv", "a")
    if isinstance(folder, UrlPath):
        assert not copy.exists()
        fetch(folder / "export", tmp_path / "copy")
        assert (tmp_path / "copy" / "trials.csv").read_text() == "a"


def test_ray_is_given_the_same_place(folder: Location) -> None:
    put(folder / "x")
    given = ray_storage(str(folder))
    files = given["storage_filesystem"] or opened("/")[0]
    assert files.get_file_info(f"{given['storage_path']}/x").is_file
    assert b"AWS" not in pickle.dumps(files), "no keys travel to workers"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("hdfs://name/x", "nothing can be kept at hdfs://; give a path, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"),
        ("s3:///x", "s3:///x names no bucket"),
        ("s3://key:secret@bucket/x", "a URL here is s3://BUCKET/PREFIX and no more: keys"),
        ("s3://bucket/x?endpoint_override=h", "AWS_ENDPOINT_URL"),
        ("s3://bucket/../other", "no '..'"),
        ("file://x", "nothing can be kept at file://"),
        ("", "is empty"),
    ],
)
def test_what_nothing_can_lie_at_is_refused(given: str, told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("?", r"\?")) as refused:
        location(given)
    assert "secret" not in str(refused.value)


def test_paths_and_urls_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PART", "x")
    assert location("file:///a/b") == Path("/a/b")
    assert location("studies") == Path("studies")
    assert location("s3://bucket/a//$PART/") == UrlPath("s3://bucket/a/x")
    assert location("gs://bucket") == UrlPath("gs://bucket")
    assert UrlPath("s3://bucket").parent == UrlPath("s3://bucket")
    assert UrlPath("s3://b/x") != Path("s3://b/x")


def test_a_bucket_that_cannot_be_used_says_why(bucket: UrlPath, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unusable(bucket / "s")
    assert not (bucket / "s" / ".writable").exists()
    with pytest.raises(OSError, match="NO_SUCH_BUCKET: The specified bucket does not exist") as missing:
        refuse_unusable(UrlPath("s3://nobody/s"))
    assert missing.value.filename == "s3://nobody/s"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageAway, match=r"NETWORK_CONNECTION: .*Could not connect"):
        refuse_unusable(bucket / "s")
    assert os.environ["AWS_ENDPOINT_URL"].endswith(":9")


def test_a_server_that_is_away_for_seconds_is_waited_for(bucket: UrlPath, s3_server: S3Server) -> None:
    path = put(bucket / "events.jsonl", "one")
    s3_server.process.send_signal(signal.SIGSTOP)
    timer = threading.Timer(4, s3_server.process.send_signal, [signal.SIGCONT])
    timer.start()
    began = time.time()
    put(path, "two")
    assert path.read_bytes() == b"two"
    assert time.time() - began > 3
    timer.join()
