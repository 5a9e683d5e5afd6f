"""Yes-or-no questions that all workers answer alike, though each sees something else."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LAG = 2
"""Steps after which an answer comes on a GPU: the host goes on, and the device is not waited for."""


class Agreement:
    """The answer is yes if any worker says so; all workers ask together.

    Args:
        device: of this worker.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._coming: deque[tuple[Tensor, Any]] = deque()

    def __call__(self, *own: bool) -> list[bool]:
        """This worker's answers -> everybody's. On several GPUs they are those of `LAG` calls before, no at first;
        after a yes, what was said meanwhile is forgotten."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return list(own)
        said = torch.tensor(own, dtype=torch.int32)
        if self._device.type != "cuda":
            dist.all_reduce(said, dist.ReduceOp.MAX)
            return [bool(one) for one in said.tolist()]
        everyones = said.pin_memory().to(self._device, non_blocking=True)
        dist.all_reduce(everyones, dist.ReduceOp.MAX)
        host = torch.empty_like(said, pin_memory=True).copy_(everyones, non_blocking=True)
        self._coming.append((host, torch.cuda.current_stream(self._device).record_event()))
        if len(self._coming) <= LAG:
            return [False] * len(own)
        host, copied = self._coming.popleft()
        copied.synchronize()
        answers = [bool(one) for one in host.tolist()]
        if any(answers):
            self._coming.clear()
        return answers
