"""From a worker's scratch folder to the storage, beside the training."""

from __future__ import annotations

import shutil
import threading
import traceback
from concurrent.futures import Future
from pathlib import Path
from typing import Any

TRACE = "paretovl_trace"
"""Attribute of what a worker raises: the trace, which does not travel with an exception otherwise."""


class Uploads:
    """Hands a worker's reports to Ray Train, which copies checkpoints to the storage while training goes on.

    A context manager: when it is left, nothing is under way any more. Ray takes reports in their order and counts one
    when its checkpoint is there; the last is waited for.

    Args:
        scratch: where checkpoints are written; what was copied from there is removed.
        moved: bytes of all checkpoints are added to its `checkpoints`.
    """

    def __init__(self, scratch: Path, moved: dict[str, int]) -> None:
        self._scratch, self._moved, self._ended = scratch, moved, list[threading.Event]()

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, *_: object) -> None:
        for ended in self._ended:
            ended.wait()

    def report(self, metrics: dict[str, Any], written: Future[Path] | None, wait: bool = False) -> None:
        """All workers call this together, with a checkpoint on rank 0, if there is one.

        Args:
            metrics: plain data.
            written: the checkpoint's folder to be.
            wait: until the checkpoint is in the storage, as for the last one.
        """
        import ray.train  # not before the environment is set
        from ray.train import Checkpoint, CheckpointUploadMode

        waits = wait or metrics["last"]
        storage, ended = ray.train.get_context().get_storage(), threading.Event()

        def upload(_: Any, name: str) -> Any:
            assert written is not None
            try:
                folder = written.result()
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                stored = storage.persist_current_checkpoint(Checkpoint(str(folder)), name)
                self._moved["checkpoints"] += size
                if folder.is_relative_to(self._scratch):
                    shutil.rmtree(folder, ignore_errors=True)
            except Exception as error:
                setattr(error, TRACE, traceback.format_exc())
                raise
            finally:
                ended.set()
            return stored

        if written is not None:
            self._ended.append(ended)
        try:
            ray.train.report(
                metrics,
                checkpoint=Checkpoint(str(self._scratch)) if written is not None else None,
                checkpoint_upload_mode=CheckpointUploadMode.SYNC if waits else CheckpointUploadMode.ASYNC,
                delete_local_checkpoint_after_upload=False,
                checkpoint_upload_fn=upload,
            )
        except BaseException:
            ended.set()  # it will not come to that
            raise
