"""The objective: multi-positive contrastive loss and its companions.

A worker compares its own rows with everyone's, so that it computes and keeps one share of the pairs (open_clip's "local
loss", Cherti et al. 2023). Each loss here is that share: the loss of the global batch is the mean over workers. What is
compared comes with gradients, which go back to its owner summed, so DDP's mean of the workers' gradients is the
gradient of the global batch's loss: one worker with batch 2B and two workers with batch B take the same step.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.noise import step_keys, uniform
from trainables.models import FusionModel
from trainables.precision import inner_products
from trainables.training.chunks import by_chunks
from trainables.training.exchange import fetch_with_gradient, gather_with_gradient, summed, workers

Sides = tuple[Tensor, Tensor]
"""Of this worker's images with everyone's captions, (batch, world x batch x n), and of its captions with everyone's
images, (batch x n, world x batch)."""


class Features(NamedTuple):
    """L2-normalised: this worker's, and everyone's in rank order."""

    own: Tensor
    everyone: Tensor


def shared(features: Tensor) -> Features:
    """(batch, dim), not normalised, to be compared with those of all workers."""
    own = F.normalize(features.float(), dim=-1)
    return Features(own, gather_with_gradient(own))


def similarities(images: Features, texts: Features) -> Sides:
    """Cosines."""
    return inner_products(images.own, texts.everyone), inner_products(texts.own, images.everyone)


def contrastive_loss(
    scores: Sides, positives: Sides, temperature: Tensor, teacher: Sides | None = None, alpha: float = 0.0
) -> Tensor:
    """Symmetric InfoNCE with uniform targets over all positives (Radford et al. 2021; Khosla et al. 2020, eq. 2).

    With a teacher, targets are `(1 - alpha) * uniform + alpha * softmax(teacher / temperature)`: momentum distillation
    (Li et al. 2021, eq. 6), among the pairs of the batch.

    Args:
        scores: cosines.
        positives: bool, at least one in every row.
        temperature: positive scalar.
        teacher: cosines of the same pairs under the teacher, without gradient.
        alpha: the teacher's share of the targets, in [0, 1].

    Returns:
        Scalar; the mean of ln(captions) and ln(images) for uninformative scores.
    """
    loss = scores[0].new_zeros(())
    for own, right, taught in zip(scores, positives, teacher or (None, None), strict=True):
        targets = right.float() / right.sum(1, keepdim=True)
        if taught is not None:
            targets = targets.lerp(F.softmax(taught / temperature.detach(), dim=1), alpha)
        loss = loss + F.cross_entropy(own / temperature, targets) / 2
    return loss


def consistency_loss(clean: Sides, adversarial: Sides, temperature: Tensor) -> Tensor:
    """How far the attack moves what a batch retrieves: TRADES (Zhang et al. 2019, eq. 5) for retrieval.

    KL(softmax(clean) || softmax(adversarial)) over captions for each image and over images for each caption, averaged.

    Args:
        clean: cosines of the clean pairs.
        adversarial: of the attacked pairs.
        temperature: positive scalar.
    """
    total = clean[0].new_zeros(())
    for before, after in zip(clean, adversarial, strict=True):
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
    chosen = (scores + gumbel).masked_fill(positives, -torch.inf).argmax(1)
    return chosen, ~positives.all(1)


def matching_loss(
    model: FusionModel,
    image_tokens: Tensor,
    text_tokens: Tensor,
    mask: Tensor,
    scores: Sides,
    positives: Sides,
    temperature: Tensor,
    keys: Tensor,
    micro_batch: int | None = None,
) -> Tensor:
    """Image-text matching with hard negatives (Li et al. 2021, eq. 4).

    Every caption is judged with its image, with another image, and its image with another caption.

    Args:
        model: judges pairs.
        image_tokens: (batch, image tokens, width), this worker's.
        text_tokens: (batch x n, length, width), n captions for each image in turn; of equal length on all workers.
        mask: (batch x n, length).
        scores: cosines; they and the temperature have no gradient here, they only say which answers are hard.
        positives: bool.
        temperature: positive scalar.
        keys: int64 (batch x n,), the source of each caption's randomness.
        micro_batch: images judged at once, see `by_chunks`.

    Returns:
        Scalar, the share of the mean cross-entropy over all workers' pairs.
    """
    each = len(text_tokens) // len(image_tokens)
    with torch.no_grad():
        of_images, of_captions = (scores[0] / temperature).repeat_interleave(each, 0), scores[1] / temperature
    right_texts, right_images = positives[0].repeat_interleave(each, 0), positives[1]
    wrong_text, some_text = hard_negatives(of_images, right_texts, uniform(keys, of_images.shape[1:]))
    wrong_image, some_image = hard_negatives(
        of_captions, right_images, uniform(step_keys(keys, 1), of_captions.shape[1:])
    )
    other_texts = fetch_with_gradient(wrong_text, text_tokens, mask)
    other_images = fetch_with_gradient(wrong_image, image_tokens)
    rows = image_tokens, text_tokens, mask, *other_texts, *other_images
    (logits,) = by_chunks(partial(_judged, model), micro_batch, *rows)
    targets = (torch.arange(3, device=logits.device) == 0).long().expand(len(logits), 3)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(-1, 3)
    counted = torch.stack([torch.ones_like(some_text), some_text, some_image], 1).float()
    return workers() * (losses * counted).sum() / summed(counted.sum())


def _judged(
    model: FusionModel,
    image_tokens: Tensor,
    text_tokens: Tensor,
    mask: Tensor,
    other_texts: Tensor,
    other_mask: Tensor,
    other_images: Tensor,
) -> tuple[Tensor]:
    """ITM logits (captions, 3, 2): of a caption with its image, of its image with the other caption, of it with the
    other image."""
    images = len(image_tokens)
    texts, masks = (
        torch.stack([own.unflatten(0, (images, -1)), other.unflatten(0, (images, -1))], 1).flatten(0, 2)
        for own, other in ((text_tokens, other_texts), (mask, other_mask))
    )
    own, wrong = model.itm_logits(image_tokens, texts, masks).float().view(images, 2, -1, 2).unbind(1)
    across = model.itm_logits(other_images, text_tokens, mask).float()
    return (torch.stack([own.flatten(0, 1), wrong.flatten(0, 1), across], 1),)


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
