"""Ranks, by hand."""

from __future__ import annotations

import numpy as np
import torch

from trainables.evaluation.retrieval import retrieval_ranks


def test_ranks_are_pessimistic() -> None:
    images = torch.eye(3)
    texts = torch.stack([images[0], images[1], images[1], images[2]])
    owner, groups = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 3])
    ranks = retrieval_ranks(images, texts, owner, groups)
    assert ranks.tr.tolist() == [1, 2, 1]  # caption 2 looks like image 1 and ties with its own caption
    assert ranks.ir.tolist() == [1, 1, 3, 1]  # its image scores 0, one ties and one is better
    shared = retrieval_ranks(images, texts, owner, np.array([0, 1, 1, 3]))
    assert shared.tr.tolist() == [1, 1, 1]  # equal captions are right for both images
    assert shared.ir.tolist() == [1, 1, 1, 1]
    collapsed = retrieval_ranks(torch.ones(3, 3), torch.ones(4, 3), owner, groups)
    assert collapsed.tr.min() >= 3
    assert collapsed.ir.min() == 3
    broken = images.clone()
    broken[0] = float("nan")
    assert retrieval_ranks(broken, texts, owner, groups).tr[0] > len(texts)
    order = torch.tensor([2, 0, 1])
    moved = retrieval_ranks(images[order], texts, order.argsort().numpy()[owner], groups)
    assert moved.tr.tolist() == ranks.tr[order].tolist()
