"""Large batches on little memory: activations of a chunk of the batch at a time (GradCache, Gao et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def by_chunks(function: Callable[..., tuple[Tensor, ...]], size: int | None, *rows: Tensor) -> tuple[Tensor, ...]:
    """`function` of so many rows at a time; only what enters and leaves it is kept.

    In the backward pass, chunk by chunk, activations are computed again, with the random numbers of the first time, and
    gone through with the gradients of what the function returned. Gradients are those of the whole: a loss over all of
    its rows is computed between the passes. Parameters get theirs once, after the last chunk, so workers exchange them
    once.

    Args:
        function: of tensors, to tensors; rows do not depend on each other.
        size: rows of the first tensor in a chunk; None for all of them.
        rows: the others have as many rows as the first, or a multiple of that, which goes along.
    """
    batch = len(rows[0])
    if size is None or size >= batch:
        return function(*rows)

    def afresh(*chunk: Tensor) -> tuple[Tensor, ...]:
        # Autocast would let chunks share the bfloat16 copies of weights, and sum their gradients in bfloat16.
        torch.clear_autocast_cache()
        return function(*chunk)

    chunks = zip(*(tensor.split(size * (len(tensor) // batch)) for tensor in rows), strict=True)
    found = [checkpoint(afresh, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
