"""A silent worker is ended; a slow one is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from trainables.config import TrialConfig
from trainables.prepare import prepare
from trainables.training.finetune import finetune
from trainables.training.watchdog import FIRST_STEP, STUCK, Watchdog


def test_silence_is_borne_longer_before_the_first_step() -> None:
    now = [0.0]
    dog = Watchdog(silent_seconds=10, clock=lambda: now[0])
    now[0] = 10 * FIRST_STEP
    assert not dog.stuck
    now[0] += 0.1
    assert dog.stuck
    dog.beat()
    now[0] += 10 * FIRST_STEP
    assert not dog.stuck, "what is read is no step"
    dog.step()
    now[0] += 10
    assert not dog.stuck
    now[0] += 0.1
    assert dog.stuck
    dog.beat()
    assert not dog.stuck


def test_a_worker_that_hangs_in_the_middle_of_an_epoch_is_found(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    now, seen = [0.0], []
    dog = Watchdog(silent_seconds=10, clock=lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds
        seen.append(dog.stuck)

    def read(line: str = "") -> None:
        passes(30)
        dog.beat()

    def asked() -> bool:
        passes(11 if sum(seen) == 0 and len(seen) > 12 else 9)
        dog.step()
        return False

    def part() -> None:
        passes(9)
        dog.step()

    config = tiny_trial.model_copy(update={"cache_dir": tmp_path / "cache"})
    prepared = prepare(config, log=read, beat=read)
    assert len(seen) > 3
    assert not any(seen), "preparation takes minutes, and is no step"
    before = len(seen)
    finetune(config, prepared, torch.device("cpu"), None, tmp_path, lambda *_: None, asked=asked, beat=part)
    steps, parts = 16, 2 * 3  # of two evaluations
    assert len(seen) - before == steps + parts
    assert sum(seen) == 1, "only the step that took longer"


def test_a_process_that_hangs_is_ended() -> None:
    script = """
import time
from trainables.training.watchdog import Watchdog
with Watchdog(0.2) as dog:
    dog.step()
time.sleep(0.5)
print("the work was over: nobody waits for it", flush=True)
with Watchdog(0.2) as dog:
    dog.step()
    time.sleep(60)
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=30, check=False, capture_output=True, text=True)
    assert ended.returncode == STUCK
    assert ended.stdout == "the work was over: nobody waits for it\n"
