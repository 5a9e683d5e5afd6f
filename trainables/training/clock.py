"""Where a trial's seconds and memory go."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Clock:
    """Seconds by phase. On a GPU, events are read once an epoch, so that the loop never waits for the device."""

    device: torch.device
    seconds: dict[str, float] = field(
        default_factory=lambda: {"load": 0.0, "attack": 0.0, "train": 0.0, "evaluate": 0.0}
    )
    _marks: list[tuple[str, Any]] = field(default_factory=list)

    def mark(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def settle(self) -> None:
        """Add up everything since the last call; waits for the device."""
        self.mark("")
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
        self._marks.clear()


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
