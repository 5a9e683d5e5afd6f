"""Rows of tensors that workers exchange, with gradients: all of them, or those that each asks for.

All workers call these together and hold equally many rows. Without other workers nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def alone() -> Iterator[None]:
    """Within, there are no other workers, for no library either: for what one makes because its own node lacks it.

    Others than this thread must not speak with workers meanwhile.
    """
    group, dist.GroupMember.WORLD = dist.GroupMember.WORLD, None
    try:
        yield
    finally:
        dist.GroupMember.WORLD = group


def workers() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """The sum over all workers, without gradient."""
    total = tensor.detach().clone()
    if workers() > 1:
        dist.all_reduce(total)
    return total


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass returns each worker its rows of the *summed* gradient, by a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        everyone = rows.new_empty(workers() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, rows.contiguous())
        return everyone

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


def gather_with_gradient(rows: Tensor) -> Tensor:
    """(batch, ...) -> rows of all workers in rank order, (world x batch, ...)."""
    return _Gather.apply(rows) if workers() > 1 else rows


class _Plan(NamedTuple):
    """Which rows go where.

    Attributes:
        sent: int64, of this worker's rows, in the order of the workers that get them.
        out: how many rows each worker gets.
        back: how many rows come from each worker.
        place: int64, which wanted row each of those is.
    """

    sent: Tensor
    out: list[int]
    back: list[int]
    place: Tensor


class _Fetch(torch.autograd.Function):
    """Rows from their owners, who get the gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: _Plan) -> Tensor:
        ctx.plan, ctx.rows = plan, len(rows)
        received = rows.new_empty(len(plan.place), *rows.shape[1:])
        dist.all_to_all_single(received, rows[plan.sent], plan.back, plan.out)
        return torch.empty_like(received).index_copy_(0, plan.place, received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        plan = ctx.plan
        returned = gradient.new_empty(len(plan.sent), *gradient.shape[1:])
        dist.all_to_all_single(returned, gradient[plan.place], plan.out, plan.back)
        own = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return own.index_put_((plan.sent,), returned, accumulate=True), None  # whose order is fixed on GPUs, too


def fetch_with_gradient(wanted: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Single rows of all workers, as if all were gathered and then chosen from; only the chosen ones are sent.

    How many come from where has to be known on the host: the device is waited for, if there are several workers.

    Args:
        wanted: int64 (wanted,), of all workers' rows in rank order; equally many on all workers.
        tensors: each (batch, ...), of equal shape on all workers.
    """
    if workers() == 1:
        return tuple(rows[wanted] for rows in tensors)
    batch, world, rank = len(tensors[0]), workers(), dist.get_rank()
    everyone = gather_with_gradient(wanted)
    owner = everyone // batch
    counts = (owner.view(world, -1, 1) == torch.arange(world, device=wanted.device)).sum(1).tolist()
    out = [asked[rank] for asked in counts]
    sent = everyone[(owner != rank).int().argsort(stable=True)[: sum(out)]] - rank * batch
    plan = _Plan(sent, out, counts[rank], (wanted // batch).argsort(stable=True))
    return tuple(_Fetch.apply(rows, plan) for rows in tensors)
