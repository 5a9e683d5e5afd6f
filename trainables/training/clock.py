"""Where a trial's seconds and memory go."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

PHASES = ("load", "attack", "train", "evaluate", "audit", "save")


@dataclass
class Clock:
    """Seconds by phase, from when it was made. On a GPU, events are read at reports, so that the loop never waits.

    Attributes:
        device: of this worker.
        held_before: seconds that earlier attempts held their devices; None if that is known from checkpoints only.
        began: seconds since 1970.
        seconds: by phase; the first is `load`.
        moved: bytes: `prepared`, that this trial's workers brought from other nodes, and `checkpoints` put into the
            storage.
    """

    device: torch.device
    held_before: float | None = None
    began: float = field(default_factory=time.time)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    moved: dict[str, int] = field(default_factory=lambda: {"prepared": 0, "checkpoints": 0})
    _marks: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mark(PHASES[0])

    @property
    def held(self) -> float:
        """Seconds that devices are held by now, with those before."""
        return (self.held_before or 0.0) + time.time() - self.began

    def mark(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def settle(self) -> None:
        """Add up everything since the last call; waits for the device. The phase goes on."""
        self.mark(self._marks[-1][0])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (phase, start), (_, end) in pairwise(self._marks):
            self.seconds[phase] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        del self._marks[:-1]


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that a worker has held, in 1e9 bytes; the same on all workers.

    On a GPU, what was allocated there since `finetune` began, without what the allocator only keeps. On CPUs, what the
    process had resident since it began.
    """
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        held = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most = torch.tensor(held / 1e9, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def by_all(count: int, device: torch.device) -> int:
    """The sum of what all workers count."""
    total = torch.tensor(count, dtype=torch.int64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return int(total)
