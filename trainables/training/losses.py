"""The objective: multi-positive contrastive loss and its companions, over all workers' pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.noise import step_keys, uniform
from trainables.models import FusionModel
from trainables.precision import inner_products


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


def positive_pairs(images: Tensor, caption_images: Tensor, caption_groups: Tensor) -> Tensor:
    """Which captions describe which images of a batch, bool (images, captions).

    Args:
        images: (images,) id of each.
        caption_images: (captions,) id of the image each was written for.
        caption_groups: (captions,) equal for equal caption strings: they describe each other's images too.
    """
    own = images[:, None] == caption_images
    same_text = caption_groups[:, None] == caption_groups
    return inner_products(own, same_text) > 0


def contrastive_loss(
    scores: Tensor, positives: Tensor, temperature: Tensor, teacher: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """Symmetric InfoNCE with uniform targets over all positives (Radford et al. 2021; Khosla et al. 2020, eq. 2).

    With a teacher, targets are `(1 - alpha) * uniform + alpha * softmax(teacher / temperature)`: momentum distillation
    (Li et al. 2021, eq. 6), among the pairs of the batch.

    Args:
        scores: cosines (images, captions).
        positives: bool (images, captions), at least one in every row and column.
        temperature: positive scalar.
        teacher: cosines of the same pairs under the teacher, without gradient.
        alpha: the teacher's share of the targets, in [0, 1].

    Returns:
        Scalar; the mean of ln(captions) and ln(images) for uninformative scores.
    """
    loss = scores.new_zeros(())
    for side in (lambda pairs: pairs, torch.t):
        targets = side(positives).float()
        targets = targets / targets.sum(1, keepdim=True)
        if teacher is not None:
            targets = targets.lerp(F.softmax(side(teacher) / temperature.detach(), dim=1), alpha)
        loss = loss + F.cross_entropy(side(scores) / temperature, targets) / 2
    return loss


def similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Cosines, (images, captions)."""
    return inner_products(F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1))


def consistency_loss(clean: Tensor, adversarial: Tensor, temperature: Tensor) -> Tensor:
    """How far the attack moves what a batch retrieves: TRADES (Zhang et al. 2019, eq. 5) for retrieval.

    KL(softmax(clean) || softmax(adversarial)) over captions for each image and over images for each caption, averaged.

    Args:
        clean: cosines (images, captions) of the clean pairs.
        adversarial: of the attacked pairs.
        temperature: positive scalar.
    """
    total = clean.new_zeros(())
    for before, after in ((clean, adversarial), (clean.T, adversarial.T)):
        logs = F.log_softmax(after / temperature, dim=1), F.log_softmax(before / temperature, dim=1)
        total = total + F.kl_div(*logs, reduction="batchmean", log_target=True) / 2
    return total


def hard_negatives(scores: Tensor, positives: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """For each row one wrong answer, drawn with the softmax of its score (Li et al. 2021, section 3.2; by Gumbel-max).

    Args:
        scores: (rows, answers) cosines over the temperature.
        positives: bool (rows, answers); they are never drawn.
        draws: (rows, answers) uniform in [0, 1), which decide.

    Returns:
        int64 (rows,), and bool (rows,) that is false where there is no wrong answer.
    """
    gumbel = -torch.log(-torch.log(draws.clamp(1e-7, 1 - 1e-7)))
    chosen = (scores.detach() + gumbel).masked_fill(positives, -torch.inf).argmax(1)
    return chosen, ~positives.all(1)


def matching_loss(
    model: FusionModel,
    image_tokens: Tensor,
    text_tokens: Tensor,
    mask: Tensor,
    scores: Tensor,
    positives: Tensor,
    keys: Tensor,
) -> Tensor:
    """Image-text matching with hard negatives (Li et al. 2021, eq. 4), over all workers' pairs.

    Every caption is judged with its image, with another image, and its image with another caption.

    Args:
        model: judges pairs.
        image_tokens: (batch, image tokens, width), this worker's.
        text_tokens: (batch x n, length, width), n captions for each image in turn; of equal length on all workers.
        mask: (batch x n, length).
        scores: (world x batch, world x batch x n) cosines over the temperature.
        positives: bool like `scores`.
        keys: int64 (batch x n,), the source of each caption's randomness.

    Returns:
        Scalar, the mean cross-entropy over all workers' pairs.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    images, each = len(image_tokens), len(text_tokens) // len(image_tokens)
    captions = torch.arange(rank * len(text_tokens), (rank + 1) * len(text_tokens), device=scores.device)
    owner = captions // each
    rows = scores[owner], scores.T[captions]
    right = positives[owner], positives.T[captions]
    wrong_text, some_text = hard_negatives(rows[0], right[0], uniform(keys, (scores.shape[1],)))
    wrong_image, some_image = hard_negatives(rows[1], right[1], uniform(step_keys(keys, 1), (len(scores),)))
    everyone = gather_with_gradient(image_tokens), gather_with_gradient(text_tokens), gather_with_gradient(mask)
    own_and_wrong = [
        torch.cat([own.unflatten(0, (images, each)), all_of[wrong_text].unflatten(0, (images, each))], 1).flatten(0, 1)
        for own, all_of in ((text_tokens, everyone[1]), (mask, everyone[2]))
    ]
    of_images = model.itm_logits(image_tokens, *own_and_wrong).float()
    of_captions = model.itm_logits(everyone[0][wrong_image], text_tokens, mask).float()
    matches = torch.cat([torch.ones(images, each), torch.zeros(images, each)], 1).flatten().long().to(scores.device)
    losses = torch.cat(
        [
            F.cross_entropy(of_images, matches, reduction="none"),
            F.cross_entropy(of_captions, torch.zeros_like(captions), reduction="none"),
        ]
    )
    counted = torch.cat([some_text.new_ones(images, each), some_text.view(images, each)], 1).flatten()
    counts = gather_with_gradient(torch.cat([counted, some_image]).float())
    return (gather_with_gradient(losses) * counts).sum() / counts.sum()


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
