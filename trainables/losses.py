"""The objective: multi-positive contrastive loss and the anchor to the frozen original, over all workers' pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class _Gather(torch.autograd.Function):
    """All-gather along dimension 0 whose backward returns each worker its rows of the *summed* gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Rows of all workers in rank order, (world x batch, dim), differentiable; the rows themselves without a group.

    Every worker computes the whole global loss, so DDP's mean of the workers' gradients is the gradient of that loss:
    one worker with batch 2B and two workers with batch B take the same step.
    """
    return _Gather.apply(rows) if dist.is_initialized() and dist.get_world_size() > 1 else rows


def positive_pairs(image_ids: Tensor, caption_groups: Tensor) -> Tensor:
    """Which captions describe which images of a batch, bool (batch, batch).

    Args:
        image_ids: (batch,) id of each pair's image.
        caption_groups: (batch,) equal for equal caption strings.
    """
    return (image_ids[:, None] == image_ids) | (caption_groups[:, None] == caption_groups)


def contrastive_loss(image_features: Tensor, text_features: Tensor, positives: Tensor, temperature: Tensor) -> Tensor:
    """Symmetric InfoNCE with uniform targets over all positives (Radford et al. 2021; Khosla et al. 2020, eq. 2).

    Args:
        image_features: (batch, dim), any norm.
        text_features: (batch, dim), any norm.
        positives: bool (batch, batch), symmetric, true on the diagonal.
        temperature: positive scalar.

    Returns:
        Scalar; ln(batch) for uninformative features.
    """
    logits = F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T / temperature
    targets = positives / positives.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def anchor_loss(image_features: Tensor, original_features: Tensor) -> Tensor:
    """Squared distance to the frozen original's clean embedding, relative to that embedding's squared norm.

    FARE's loss (Schlarmann et al. 2024, eq. 3) up to the norm, which makes it comparable to the contrastive loss for
    any width; mean over the batch.

    Args:
        image_features: (batch, dim) of the adversarial images, not normalised.
        original_features: (batch, dim) of the clean images under the original model, not normalised.
    """
    return embedding_deviation(image_features, original_features).mean()


def embedding_deviation(features: Tensor, original_features: Tensor) -> Tensor:
    """Squared distance over the original's squared norm, (batch,)."""
    return (features - original_features).square().sum(-1) / original_features.square().sum(-1)
