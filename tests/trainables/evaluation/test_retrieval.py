"""Ranks, smaller galleries and folds, by hand and against a plain reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trainables.evaluation import retrieval
from trainables.evaluation.retrieval import Ranks, fold_ranks, restrict, retrieval_ranks


def random_gallery(images: int, captions: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Coarse features, so that there are ties, every image with a caption at least."""
    generator = torch.Generator().manual_seed(seed)

    def feature(rows: int) -> torch.Tensor:
        return torch.randint(-2, 3, (rows, 4), generator=generator).float()

    owner = np.concatenate([np.arange(images), torch.randint(images, (captions - images,), generator=generator)])
    return feature(images), feature(captions), np.sort(owner)


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
    twice = retrieval_ranks(images, texts, owner, np.array([0, 1, 2, 2]))
    assert twice.tr.tolist() == ranks.tr.tolist()  # two equal captions of one image change nothing
    collapsed = retrieval_ranks(torch.ones(3, 3), torch.ones(4, 3), owner, groups)
    assert collapsed.tr.min() >= 3
    assert collapsed.ir.min() == 3
    broken = images.clone()
    broken[0] = float("nan")
    ranks = retrieval_ranks(broken, texts, owner, groups)
    assert ranks.tr[0] > len(texts)
    assert ranks.ir.min() > len(images)  # every caption meets that image


def test_ranks_equal_a_plain_reference_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts, owner = random_gallery(7, 23)
    groups = np.arange(23) // 2
    ranks = retrieval_ranks(images, texts, owner, groups)
    describes = [
        [any(groups[c] == groups[d] and owner[d] == i for d in range(23)) for c in range(23)] for i in range(7)
    ]
    for i in range(7):
        scores = (texts @ images[i]).tolist()
        best = max(s for c, s in enumerate(scores) if describes[i][c])
        assert ranks.tr[i] == 1 + sum(s >= best for c, s in enumerate(scores) if not describes[i][c])
    for c in range(23):
        scores = (images @ texts[c]).tolist()
        best = max(s for i, s in enumerate(scores) if describes[i][c])
        assert ranks.ir[c] == 1 + sum(s >= best for i, s in enumerate(scores) if not describes[i][c])
    monkeypatch.setitem(retrieval.CELLS, "cpu", 50)
    few = retrieval_ranks(images, texts, owner, groups)
    np.testing.assert_array_equal(few.tr, ranks.tr)
    np.testing.assert_array_equal(few.ir, ranks.ir)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), permutation=st.permutations(range(6)))
def test_the_order_of_the_gallery_changes_nothing(seed: int, permutation: list[int]) -> None:
    images, texts, owner = random_gallery(6, 17, seed)
    ranks = retrieval_ranks(images, texts, owner, np.arange(17))
    order = np.array(permutation)
    rows, moved_owner = restrict(owner, order)
    moved = retrieval_ranks(images[order], texts[rows], moved_owner, rows)
    np.testing.assert_array_equal(moved.tr, ranks.tr[order])
    np.testing.assert_array_equal(moved.ir, ranks.ir[rows])


def test_restricted_galleries() -> None:
    owner = np.array([0, 0, 1, 2, 2, 2, 1])
    rows, places = restrict(owner, np.array([2, 0]))
    assert rows.tolist() == [3, 4, 5, 0, 1]
    assert places.tolist() == [0, 0, 0, 1, 1]
    rows, places = restrict(owner, np.array([1, 2]), captions_per_image=2)
    assert rows.tolist() == [2, 6, 3, 4]
    assert places.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="image 0 has 2 captions; 3 are needed"):
        restrict(owner, np.array([2, 0]), captions_per_image=3)


def test_folds_are_blocks_of_consecutive_images() -> None:
    images, texts, owner = random_gallery(6, 13)
    owner = np.repeat(np.arange(6), [2, 2, 3, 2, 2, 2])
    together = fold_ranks(images, texts, owner, np.arange(13), fold_images=3, captions_per_image=2)
    first = retrieval_ranks(images[:3], texts[[0, 1, 2, 3, 4, 5]], np.repeat(range(3), 2), np.arange(6))
    second = retrieval_ranks(images[3:], texts[7:], np.repeat(range(3), 2), np.arange(6))
    assert together.tr.tolist() == [*first.tr, *second.tr]
    assert together.ir.tolist() == [*first.ir, *second.ir]
    assert together.caption_image.tolist() == np.repeat(range(6), 2).tolist()

    def recall(ranks: Ranks) -> float:
        return (ranks.ir <= 1).mean()

    assert recall(together) == pytest.approx((recall(first) + recall(second)) / 2)
    with pytest.raises(ValueError, match="6 images make no whole number of blocks of 4"):
        fold_ranks(images, texts, owner, np.arange(13), fold_images=4)


def test_a_perfect_model_of_coco_size_is_ranked_in_little_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(1000, 8, generator=generator), dim=-1)
    owner = np.repeat(np.arange(1000), 5)
    ranks = fold_ranks(images, images[owner], owner, np.arange(5000), fold_images=200)
    assert isinstance(ranks, Ranks)
    assert ranks.tr.max() == ranks.ir.max() == 1
