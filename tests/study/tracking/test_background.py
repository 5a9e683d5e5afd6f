"""The projection in the background: requests become one, failures are kept and tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from study.tracking.mlflow_store import TrackingError
from study.tracking.projection import BackgroundProjection, Projection


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
