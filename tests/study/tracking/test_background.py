"""Work in the background: requests become one, failures are kept and tried again."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from study.tracking.background import Background


class Work:
    """Keeps what it has done, and fails or waits when told to."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.failures = 0
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, asked: int) -> None:
        self.gate.wait(10)
        if self.failures:
            self.failures -= 1
            raise OSError("down")
        self.done.append(asked)


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)


def background(work: Work) -> Background[int]:
    return Background("it", work, interval_seconds=0.01, retry_seconds=0.01)


def test_requests_made_during_a_call_become_one_the_newest() -> None:
    work = Work()
    work.gate.clear()
    worker = background(work)
    worker.request(1)
    wait_for(lambda: not worker._wanted.is_set())
    for count in range(2, 50):
        worker.request(count)
    work.gate.set()
    wait_for(lambda: len(work.done) == 2)
    worker.finish(3)
    assert work.done == [1, 49, 3]


def test_a_failure_is_kept_warned_of_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    work = Work()
    work.failures = 3
    worker = background(work)
    worker.request(1)
    wait_for(lambda: work.done)
    assert worker.last_error is None
    assert [record.message for record in caplog.records] == ["it: down"]
    work.failures = 1
    worker.finish(1)
    assert worker.last_error == "down"


def test_a_long_call_is_followed_by_a_longer_rest() -> None:
    began: list[int] = []
    done: list[float] = []

    def busy(asked: int) -> None:
        began.append(asked)
        start = time.thread_time()
        while time.thread_time() - start < 0.1:
            pass
        done.append(time.monotonic())

    worker = Background("it", busy, interval_seconds=0.01)
    worker.request(1)
    wait_for(lambda: done)
    worker.request(2)
    while time.monotonic() < done[0] + 0.3:
        assert began == [1], "of 0.5 s in all it works a fifth"
        time.sleep(0.005)
    worker.finish(3)


def test_the_last_call_is_made_alone() -> None:
    """It waits for the one under way, and in the thread of the caller."""
    inside, threads = threading.Semaphore(1), list[threading.Thread]()

    def alone(asked: int) -> None:
        assert inside.acquire(blocking=False), "two at once"
        threads.append(threading.current_thread())
        time.sleep(0.1)
        inside.release()

    worker = Background("it", alone)
    worker.request(1)
    wait_for(lambda: threads)
    worker.finish(2)
    assert worker.last_error is None
    assert threads[1:] == [threading.current_thread()]
