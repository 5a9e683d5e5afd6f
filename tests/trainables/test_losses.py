"""Losses, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from trainables.losses import anchor_loss, contrastive_loss, positive_pairs


def test_contrastive_loss_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    positives = positive_pairs(torch.tensor([1, 2, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 0]))
    assert positives[1, 2]
    assert positives[0, 4]
    assert not positives[0, 1]
    scores = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T / 0.3
    expected = 0.0
    for matrix in (scores, scores.T):
        for i in range(5):
            right = [j for j in range(5) if positives[i, j]]
            total = sum(math.exp(matrix[i, j]) for j in range(5))
            expected -= sum(math.log(math.exp(matrix[i, j]) / total) for j in right) / len(right) / 10
    assert contrastive_loss(images, texts, positives, torch.tensor(0.3)).item() == pytest.approx(expected, abs=1e-5)
    same = torch.ones(5, 4)
    assert contrastive_loss(same, same, torch.eye(5, dtype=torch.bool), torch.tensor(0.1)).item() == pytest.approx(
        math.log(5), abs=1e-5
    )
    assert anchor_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])).item() == pytest.approx(25 / 16)
