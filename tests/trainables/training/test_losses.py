"""Losses, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.noise import sample_keys
from trainables.models import FusionModel
from trainables.training.losses import (
    Sides,
    anchor_loss,
    consistency_loss,
    contrastive_loss,
    hard_negatives,
    matching_loss,
    shared,
    similarities,
)
from trainables.training.positives import Positives


def positive_pairs(owners: Tensor, groups: Tensor) -> Tensor:
    """Of all captions with all images."""
    described = Positives(owners.numpy(), groups.numpy(), owners.device)
    return described(torch.arange(int(owners.max()) + 1), torch.arange(len(owners)))


def test_positives_are_own_captions_and_equal_ones() -> None:
    found = positive_pairs(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2]))
    assert found.tolist() == [[True, True, True, False], [False, True, True, True]]


def test_a_caption_describes_an_image_that_has_the_same_words_in_one_not_drawn() -> None:
    described = Positives(np.array([0, 0, 1]), np.array([0, 1, 1]), torch.device("cpu"))
    assert described(torch.tensor([0, 1]), torch.tensor([0, 2])).tolist() == [[True, True], [False, True]]


def both(pairs: Tensor) -> Sides:
    """As one worker alone has them."""
    return pairs, pairs.T


@pytest.mark.parametrize("each", [1, 2])
def test_contrastive_loss_by_hand(each: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(5, 4, generator=generator), torch.randn(5 * each, 4, generator=generator)
    sides = similarities(shared(images), shared(texts))
    scores = F.normalize(images) @ F.normalize(texts).T
    positives = positive_pairs(torch.arange(5).repeat_interleave(each), torch.tensor([0, 1, 2, 3, 0] * each))
    expected = 0.0
    for matrix, right in ((scores / 0.3, positives), (scores.T / 0.3, positives.T)):
        for i in range(len(matrix)):
            own = [j for j in range(matrix.shape[1]) if right[i, j]]
            total = sum(math.exp(value) for value in matrix[i])
            expected -= sum(math.log(math.exp(matrix[i, j]) / total) for j in own) / len(own) / len(matrix) / 2
    assert contrastive_loss(sides, both(positives), torch.tensor(0.3)).item() == pytest.approx(expected, abs=1e-5)
    flat = contrastive_loss(both(torch.ones(5, 5)), both(torch.eye(5, dtype=torch.bool)), torch.tensor(0.1))
    assert flat.item() == pytest.approx(math.log(5), abs=1e-5)


def test_anchor_is_fares_distance_over_the_original_norm() -> None:
    assert anchor_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])).item() == pytest.approx(25 / 16)


def test_consistency_is_zero_for_equal_scores_and_kl_otherwise() -> None:
    clean, moved = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.2, 0.0], [0.0, 1.0]])
    temperature = torch.tensor(0.5)
    assert consistency_loss(both(clean), both(clean), temperature).item() == pytest.approx(0, abs=1e-7)
    p, q = F.softmax(clean[0] / 0.5, 0), F.softmax(moved[0] / 0.5, 0)
    row = (p * (p / q).log()).sum() / 2  # the other row and column are unmoved
    assert consistency_loss(both(clean), both(moved), temperature).item() == pytest.approx(row.item(), rel=1e-5)


def test_hard_negatives_are_never_positives_and_follow_the_softmax() -> None:
    scores = torch.tensor([[9.0, 1.0, 0.0, 0.0]]).repeat(4000, 1)
    positives = torch.tensor([[True, False, False, False]]).repeat(4000, 1)
    draws = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    chosen, there = hard_negatives(scores, positives, draws)
    assert there.all()
    shares = torch.bincount(chosen, minlength=4) / 4000
    torch.testing.assert_close(shares[1:], F.softmax(torch.tensor([1.0, 0.0, 0.0]), 0), atol=0.03, rtol=0)
    assert shares[0] == 0
    assert not hard_negatives(scores[:1], torch.ones(1, 4, dtype=torch.bool), draws[:1])[1].any()


class Judge(FusionModel):
    """Says "match" as strongly as the product of what an image and a caption hold."""

    def itm_logits(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        each = len(text_tokens) // len(image_tokens)
        match = image_tokens[:, 0, 0].repeat_interleave(each) * text_tokens[:, 0, 0]
        return torch.stack([torch.zeros_like(match), match], 1)


Judge.__abstractmethods__ = frozenset()  # the matching loss asks for nothing else of a model


@pytest.mark.parametrize("each", [1, 2])
def test_matching_loss_by_hand(each: int) -> None:
    images, texts = torch.tensor([1.0, 2.0, 3.0]), torch.arange(1.0, 1 + 3 * each)
    owners = torch.arange(3).repeat_interleave(each)
    positives = positive_pairs(owners, torch.arange(3 * each))
    # One wrong answer stands out everywhere, so it is drawn: image 2 and the last caption, or the first two.
    scores = torch.full((3, 3 * each), -100.0)
    scores[2, :] = scores[:, -1] = 100.0
    scores[2, 0] = scores[0, 0] = 300.0
    scores[0, -each:], scores[0, -1] = 300.0, 400.0
    loss = matching_loss(
        Judge(),
        images.view(3, 1, 1),
        texts.view(-1, 1, 1),
        torch.ones(3 * each, 1),
        both(scores),
        both(positives),
        torch.tensor(1.0),
        sample_keys(0, 0, torch.arange(3 * each)),
    )
    total = 0.0
    for caption, owner in enumerate(owners.tolist()):
        wrong_text = 0 if owner == 2 else 3 * each - 1
        wrong_image = 0 if owner == 2 else 2
        for image, text, match in (
            (owner, caption, 1),
            (owner, wrong_text, 0),
            (wrong_image, caption, 0),
        ):
            logit = images[image] * texts[text]
            total += F.softplus(-logit if match else logit).item()
    assert loss.item() == pytest.approx(total / (3 * len(texts)), rel=1e-5)
