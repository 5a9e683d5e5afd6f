"""Checkpoints reach the storage beside the training, and nothing of them is left behind."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.train import CheckpointUploadMode

from trainables.execution.uploads import TRACE, Uploads


class Train:
    """Ray Train as a worker sees it: `report` with an upload that happens when the test says so."""

    def __init__(self, storage: Path) -> None:
        self.uploads: list[Callable[[], Any]] = []
        self.modes: list[CheckpointUploadMode] = []
        self.last = threading.Event()
        self.persist_current_checkpoint = lambda checkpoint, name: shutil.copytree(checkpoint.path, storage / name)

    def report(self, metrics: Any, checkpoint: Any, checkpoint_upload_mode: Any, **fields: Any) -> None:
        self.modes.append(checkpoint_upload_mode)
        if checkpoint is not None:
            name, upload = f"checkpoint_{metrics['step']}", fields["checkpoint_upload_fn"]
            self.uploads.append(lambda: upload(checkpoint, name))
        if metrics["last"]:
            self.last.set()


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    (tmp_path / "storage").mkdir()
    (tmp_path / "scratch" / "step-2").mkdir(parents=True)
    found = Train(tmp_path / "storage")
    monkeypatch.setattr(ray.train, "report", found.report)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: found))
    return found


def test_only_the_last_report_waits_and_leaving_waits_for_all(train: Train, tmp_path: Path) -> None:
    written: Future[Path] = Future()
    left, moved = threading.Event(), {"checkpoints": 5}
    (tmp_path / "scratch" / "step-2" / "weights").write_bytes(b"1234567")

    def worker() -> None:
        with Uploads(tmp_path / "scratch", moved) as uploads:
            uploads.report({"step": 2, "last": False}, written)
            uploads.report({"step": 4, "last": True}, None)
        left.set()

    thread = threading.Thread(target=worker)
    thread.start()
    assert train.last.wait(10)
    assert not left.wait(0.1)
    written.set_result(tmp_path / "scratch" / "step-2")
    train.uploads[0]()
    thread.join(10)
    assert left.is_set()
    assert train.modes == [CheckpointUploadMode.ASYNC, CheckpointUploadMode.SYNC]
    assert [path.name for path in (tmp_path / "storage").iterdir()] == ["checkpoint_2"]
    assert list((tmp_path / "scratch").iterdir()) == []
    assert moved == {"checkpoints": 12}


def test_what_could_not_be_written_is_the_trials_own_fault(train: Train, tmp_path: Path) -> None:
    written: Future[Path] = Future()
    written.set_exception(OSError("no space left"))
    with Uploads(tmp_path / "scratch", {"checkpoints": 0}) as uploads:
        uploads.report({"step": 2, "last": False}, written)
        with pytest.raises(OSError, match="no space left") as raised:
            train.uploads[0]()
    assert "no space left" in getattr(raised.value, TRACE)


def test_a_report_that_fails_is_not_waited_for(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionError("the other workers are gone")

    monkeypatch.setattr(ray.train, "report", lost)
    with pytest.raises(ConnectionError), Uploads(tmp_path / "scratch", {"checkpoints": 0}) as uploads:
        uploads.report({"step": 2, "last": False}, Future())
