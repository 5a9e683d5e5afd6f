"""How fast a device is: products of matrices, its memory, and a trial of random numbers on it."""

from __future__ import annotations

import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainables.config import TrialConfig
    from trainables.prepare import Prepared
    from trainables.results import TrialResult

SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the matrices: large enough to fill the device."""
COPIED = {"cuda": 2**30, "cpu": 2**28}
"""Bytes of a copy: more than any cache holds."""

ROOT = Path(__file__).parents[1]


def rate(run: Callable[[], object], device: torch.device, seconds: float = 0.5) -> float:
    """The most runs a second of several tries, the first of which does not count."""
    run()
    best, count, end = 0.0, 1, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        synchronise(device)
        elapsed = time.perf_counter() - start
        best = max(best, count / elapsed)
        if elapsed < seconds / 10:  # too short to be timed well
            count *= 2
    return best


def matmul_flops(device: torch.device) -> float:
    """FLOPs a second of large products of matrices: bfloat16 on GPUs, float32 on CPUs, as trials compute there."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    side, precision = SIDE[kind], torch.bfloat16 if kind == "cuda" else torch.float32
    one, other = (torch.randn(side, side, device=device, dtype=precision) for _ in range(2))
    into = torch.empty_like(one)
    return 2.0 * side**3 * rate(lambda: torch.matmul(one, other, out=into), device)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy."""
    size = COPIED["cuda" if device.type == "cuda" else "cpu"]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size * rate(lambda: target.copy_(source), device)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_once(config: TrialConfig, prepared: Prepared, device: torch.device) -> TrialResult:
    """One trial alone in this process, and what it measured; its model is `prepared.base` afterwards."""
    from trainables.execution.checkpoints import RESULT
    from trainables.results import TrialResult
    from trainables.training.finetune import finetune

    with tempfile.TemporaryDirectory() as scratch:
        finetune(config, prepared, device, None, Path(scratch), lambda metrics, written: None)
        (result,) = Path(scratch).rglob(RESULT)
        return TrialResult.model_validate_json(result.read_text(encoding="utf-8"))


@contextmanager
def host_syncs(device: torch.device) -> Iterator[Counter[str]]:
    """Count where this project's code makes the host wait for the GPU, by file and line; nothing is counted on CPUs.

    Outside of evaluations. What PyTorch does not see as waiting, such as `torch.cuda.synchronize`, does not count.
    """
    places: Counter[str] = Counter()

    def count(message: Warning | str, *_: object, **__: object) -> None:
        if "synchronizing" in str(message):
            own = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
            own = [frame for frame in own if "site-packages" not in frame.filename and frame.name != "count"]
            if own and not any(frame.name in ("evaluate", "audit") for frame in own):
                places[f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
