"""A silent worker is ended; a slow one is not."""

from __future__ import annotations

import subprocess
import sys

from trainables.training.watchdog import SLOWEST_EPOCHS, STUCK, Watchdog


def test_silence_is_measured_against_the_slowest_epoch() -> None:
    now = [0.0]
    dog = Watchdog(silent_seconds=10, clock=lambda: now[0])
    now[0] = 10
    assert not dog.stuck
    now[0] = 10.1
    assert dog.stuck, "also before the first epoch"
    dog.beat()
    now[0] += 10.1 * SLOWEST_EPOCHS
    assert not dog.stuck
    now[0] += 0.1
    assert dog.stuck
    dog.beat()
    now[0] += 1
    dog.beat()
    assert not dog.stuck


def test_a_process_that_hangs_is_ended() -> None:
    script = """
import time
from trainables.training.watchdog import Watchdog
with Watchdog(0.2):
    pass
time.sleep(0.5)  # the work is over: nobody waits for it
with Watchdog(0.2):
    time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=30, check=False).returncode == STUCK
