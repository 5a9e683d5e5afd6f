"""Re-ranking: by hand, and beside the published loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from benchmarks.reranking import gallery, published_scores
from trainables.config import TinyConfig
from trainables.evaluation import reranking
from trainables.evaluation.reranking import candidate_scores, reranked
from trainables.evaluation.retrieval import Ranks, retrieval_ranks
from trainables.models import FusionModel, parameters_of
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.training.pretraining import train_tokenizer


class Table(FusionModel):
    """The matching score of image i and the caption `word<j>` is `table[i, j]`; counts what is asked."""

    similarity_weight = 0.0

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.asked = table, torch.zeros(table.shape, dtype=torch.int64)

    # A function in place of the attribute: of a tokenizer, only its call is used.
    def tokenizer(self, captions: list[str], **_: Any) -> dict[str, Tensor]:
        tokens = torch.tensor([[int(caption.removeprefix("word"))] for caption in captions])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def text_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens[:, :, None].float()

    def itm_logits(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        captions = text_tokens[:, 0, 0].long()
        image = image_tokens[:, 0, 0].long().repeat_interleave(len(captions) // len(image_tokens))
        self.asked[image, captions] += 1  # once, if it only fills up beside itself
        return torch.stack([torch.full((len(captions),), 1e6), self.table[image, captions]], 1)


Table.__abstractmethods__ = frozenset()  # re-ranking asks for nothing else of a model


def ranks(similarity: Tensor, table: Tensor, owner: list[int], candidates: int, **options: Any) -> tuple[Ranks, Table]:
    """Images are unit vectors, so that captions' features are their columns of similarities."""
    images, model = len(similarity), Table(table)
    features, texts = torch.eye(images), similarity.T.contiguous()
    groups = options.pop("groups", np.arange(len(owner)))
    by_similarity = retrieval_ranks(features, texts, np.array(owner), groups)
    captions = [f"word{caption}" for caption in range(len(owner))]
    tokens = torch.arange(images).float()[:, None, None].split(2)  # chunks of any size
    found = reranked(
        model, by_similarity, tokens, features, captions, texts, groups, candidates=candidates, max_tokens=9, **options
    )
    return found, model


SIMILARITY = torch.tensor([[0.9, 0.8, 0.1, 0.7], [0.2, 0.5, 0.6, 0.4], [0.3, 0.1, 0.0, 0.2]])
OWNER = [0, 1, 1, 2]


def test_candidates_are_ordered_by_matching_and_the_rest_by_similarity() -> None:
    table = torch.tensor([[1.0, 2.0, 9.0, 9.0], [9.0, 3.0, 0.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    found, model = ranks(SIMILARITY, table, OWNER, 2)
    # Image 0 chooses between captions 0 and 1 and prefers 1; image 1 between 2 and 1, both its own; image 2 between 0
    # and 3, which tie, and a tie counts against it.
    assert found.tr.tolist() == [2, 1, 2]
    # Caption 0 chooses between images 0 and 2, caption 1 between 0 and 1, caption 2 between 1 and 0 (0 scores 9),
    # caption 3 between 0 and 1: its own is no candidate and stays third.
    assert found.ir.tolist() == [2, 1, 2, 3]
    assert (model.asked <= 1).all()
    assert model.asked.sum() == 9  # of 3 x 2 + 4 x 2 questions, five are asked both ways


def test_all_candidates_are_all_matching() -> None:
    table = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [0.0, 0.0, 0.0, 9.0]])
    found, model = ranks(SIMILARITY, table, OWNER, 100)
    assert found.tr.tolist() == [4, 2, 1]
    assert found.ir.tolist() == [2, 1, 1, 1]
    assert (model.asked == 1).all()


def test_ties_in_similarity_keep_right_answers_out() -> None:
    """Equal similarities everywhere: no right answer is a candidate for certain, whatever the matching says."""
    found, _ = ranks(torch.zeros(3, 4), torch.eye(3)[:, OWNER], OWNER, 2)
    assert found.tr.tolist() == [4, 3, 4]
    assert found.ir.tolist() == [3, 3, 3, 3]


def test_nan_is_worse_than_any_gallery() -> None:
    table = torch.tensor([[1.0, 2.0, 9.0, 9.0], [9.0, 3.0, float("nan"), 9.0], [9.0, 9.0, 9.0, 9.0]])
    found, _ = ranks(SIMILARITY, table, OWNER, 2)
    assert found.tr.tolist() == [2, 5, 2]
    assert found.ir.tolist() == [2, 1, 4, 3]
    similarity = SIMILARITY.clone()
    similarity[0, 3] = float("nan")
    found, _ = ranks(similarity, torch.eye(3)[:, OWNER], OWNER, 2)
    assert found.tr[0] == 5
    assert found.ir[3] == 4
    no_right_candidate = torch.tensor([[float("nan"), 1.0]]), torch.tensor([[False, False]]), np.array([3])
    assert reranking._ranks(*no_right_candidate, gallery=3).tolist() == [4]


def test_equal_captions_are_right_for_both_images() -> None:
    found, _ = ranks(SIMILARITY, -SIMILARITY, [0, 1, 1, 2], 4, groups=np.array([0, 1, 2, 0]))
    assert found.tr.tolist() == [2, 3, 3]  # caption 3 is right for image 0 as well
    assert found.ir.tolist() == [2, 2, 3, 1]  # and caption 0 for image 2


@pytest.mark.parametrize("family", [Albef, Blip])
def test_scores_equal_the_published_loop(family: type[Albef | Blip]) -> None:
    torch.manual_seed(0)
    captions, owner = gallery(6)
    size = TinyConfig(width=32, layers=4, heads=2, patch_pixels=8, embedding=16)
    model = family.tiny(size, 32, 64, train_tokenizer(captions)).eval()
    with torch.no_grad():
        for parameter in parameters_of(model, "all"):
            parameter.add_(0.1 * torch.randn_like(parameter))
        tokens = model.image_tokens(torch.rand(6, 3, 32, 32))
    images = F.normalize(model.image_features(tokens).detach() + torch.randn(6, 16), dim=-1)
    texts = F.normalize(torch.randn(30, 16) + images[owner], dim=-1)
    similarity = images @ texts.T
    firsts = similarity.topk(7).indices, similarity.T.topk(3).indices
    with torch.no_grad():
        expected = published_scores(model, tokens, images, captions, texts, *firsts)
    found = candidate_scores(model, tokens.split(4), images, captions, texts, *firsts, max_tokens=64)
    for one, other in zip(expected, found, strict=True):
        assert one.std() > 0.05
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [Albef, Blip])
def test_scores_do_not_depend_on_how_pairs_are_grouped(
    family: type[Albef | Blip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images with different numbers of candidates, in chunks and calls of any size."""
    torch.manual_seed(0)
    captions, owner = gallery(7)
    size = TinyConfig(width=32, layers=2, heads=2, patch_pixels=8, embedding=16)
    model = family.tiny(size, 32, 64, train_tokenizer(captions)).eval()
    with torch.no_grad():
        for parameter in parameters_of(model, "all"):
            parameter.add_(0.1 * torch.randn_like(parameter))
        tokens = model.image_tokens(torch.rand(7, 3, 32, 32))
    images = F.normalize(torch.randn(7, 16), dim=-1)
    texts = F.normalize(torch.randn(35, 16) + 3 * images[0] + images[owner], dim=-1)  # image 0 is everybody's candidate
    firsts = (images @ texts.T).topk(5).indices, (texts @ images.T).topk(2).indices
    found, calls = [], []
    matching = model.itm_logits
    for pairs, chunk in ((1, 7), (3, 2), (16, 3), (1000, 7)):
        asked: list[tuple[int, int]] = []

        def counted(image_tokens: Tensor, text_tokens: Tensor, mask: Tensor, asked: Any = asked) -> Tensor:
            asked.append((len(image_tokens), len(text_tokens)))
            return matching(image_tokens, text_tokens, mask)

        monkeypatch.setattr(model, "itm_logits", counted)
        monkeypatch.setitem(reranking.PAIRS, "cpu", pairs)
        scores = candidate_scores(model, tokens.split(chunk), images, captions, texts, *firsts, max_tokens=64)
        found.append(torch.cat([part.flatten() for part in scores]))
        calls.append(asked)
        assert max(count for _, count in asked) <= pairs
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=1e-5, rtol=0)
    assert found[0].std() > 0.05
    assert [len(asked) for asked in calls] == sorted((len(asked) for asked in calls), reverse=True)
    assert len(calls[-1]) == 1
    assert calls[-1][0][0] == 7, "all images in one call"


def test_workers_share_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two workers score and add up is what one scores, and neither scores the other's images."""
    summed: list[Tensor] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda scores: summed.append(scores.clone()))
    table = 1 + torch.rand(3, 4)
    for own in ([0, 1], [2], [0, 1, 2]):
        model = Table(table)
        candidate_scores(
            model,
            [torch.tensor(own).float()[:, None, None]],
            torch.eye(3),
            [f"word{caption}" for caption in range(4)],
            SIMILARITY.T.contiguous(),
            SIMILARITY.topk(2).indices,
            SIMILARITY.T.topk(2).indices,
            max_tokens=9,
            own_images=np.array(own),
        )
        assert (model.asked.sum(1) > 0).nonzero()[:, 0].tolist() == own
    assert torch.equal(summed[0] + summed[1], summed[2])
    assert (summed[2] > 0).all()
