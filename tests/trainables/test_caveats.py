"""Numbers that mean nothing are told: what chance reaches, what did not change, what is too small."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from trainables.caveats import at_chance, chance, evaluation_caveats, foreseen
from trainables.config import DataConfig, ModelConfig, Protocol, TrialConfig
from trainables.evaluation.retrieval import retrieval_ranks
from trainables.results import Metric


def test_chance_of_four_images_with_two_captions_each() -> None:
    assert chance(1, 4, 8) == pytest.approx((2 / 8 + 1 / 4) / 2)
    both_missed = 6 / 8 * 5 / 7
    assert chance(2, 4, 8) == pytest.approx((1 - both_missed + 2 / 4) / 2)
    assert chance(7, 4, 8) == pytest.approx((1 + 1) / 2), "of seven captions one is always its own"
    assert chance(10, 4, 8) == 1


def test_chance_is_what_random_embeddings_reach() -> None:
    images, own, repeats = 20, 5, 400
    owner = np.repeat(np.arange(images), own)
    torch.manual_seed(0)
    hits = []
    for _ in range(repeats):
        features = (normalize(torch.randn(count, 16), dim=1) for count in (images, images * own))
        ranks = retrieval_ranks(*features, owner, np.arange(len(owner)))
        hits.append([((ranks.tr <= k).mean() + (ranks.ir <= k).mean()) / 2 for k in (1, 5)])
    found, error = np.mean(hits, axis=0), np.std(hits, axis=0) / np.sqrt(repeats)
    for k, value, deviation in zip((1, 5), found, error, strict=True):
        assert abs(value - chance(k, images, images * own)) < 4 * deviation


def measured(metrics: dict[str, tuple[float, float, float]], **fields: Any) -> Any:
    named = {name: Metric(value=v, low=low, high=high) for name, (v, low, high) in metrics.items()}
    given = {"metrics": named, "correct": {}, "queries": {"tr": 100, "ir": 500}, **fields}
    return SimpleNamespace(**given)


def test_one_recall_above_chance_is_enough() -> None:
    at = {"clean/mr_r1": (0.012, 0.0, 0.03), "clean/mr_r5": (0.055, 0.03, 0.08), "clean/mr_r10": (0.10, 0.07, 0.14)}
    told = at_chance(measured(at), 0.95)
    assert told is not None
    assert "clean/mr_r10 is 0.100 [0.070, 0.140], chance 0.09" in told
    assert "(100 images, 500 captions)" in told
    assert at_chance(measured(at | {"clean/mr_r10": (0.2, 0.15, 0.25)}), 0.95) is None
    assert at_chance(measured(at | {"both/mr_r10": (0.9, 0.8, 1.0)}), 0.95) == told, "what is attacked does not count"
    assert at_chance(measured({"clean/mr_r1": (0.0, 0.0, 0.0)}), 0.95) is not None, "pessimistic ranks are below chance"
    assert at_chance(measured({"clean/mr_r1": (1.0, 1.0, 1.0)}), 0.95) is None


def test_the_luckiest_of_many_is_no_better_than_chance() -> None:
    lucky = measured({"clean/mr_r5": (0.09, 0.06, 0.12)})
    assert at_chance(lucky, 0.95) is None
    assert at_chance(lucky, 0.95, looks=100) is not None


def test_what_cannot_be_judged_is_not_told() -> None:
    assert at_chance(measured({"clean/mr_r5": (0.0, 0.0, 0.0)}, queries={}), 0.95) is None
    assert at_chance(measured({"image/mr_r5": (0.0, 0.0, 0.0)}), 0.95) is None
    few = {"queries": {"tr": 5, "ir": 25}}
    assert at_chance(measured({"clean/mr_r5": (1.0, 1.0, 1.0)}, **few), 0.95) is None, "five of five are always found"


def test_an_attack_that_changes_nothing() -> None:
    protocol = Protocol.model_validate({"attacks": ["image", "text"], "gallery_images": 100})
    names = ("tr_r1", "ir_r1", "mr_r1")
    clean = {f"clean/{name}": (0.5, 0.4, 0.6) for name in names}
    weaker = {f"text/{name}": (0.4, 0.3, 0.5) for name in names}
    same = {f"image/{name}": (0.5, 0.4, 0.6) for name in names}
    (told,) = evaluation_caveats(measured(clean | same | weaker), protocol)
    assert told.text.startswith("image: every query is answered as without an attack")
    assert "epsilon 2/255 and 1 words" in told.text
    assert not told.void
    # As many answers, but of other queries: the bits decide where they are known.
    bits = {f"{target}/tr_r1": word for target, word in (("clean", "gA=="), ("image", "QA=="), ("text", "gA=="))}
    (told,) = evaluation_caveats(measured(clean | same | weaker, correct=bits), protocol)
    assert told.text.startswith("text:")


def test_a_small_gallery_and_chance_at_once() -> None:
    protocol = Protocol.model_validate({"attacks": [], "gallery_images": 200})
    told = evaluation_caveats(measured({"clean/mr_r1": (0.01, 0.0, 0.02)}), protocol)
    assert [caveat.void for caveat in told] == [True, False]
    assert told[1].text.startswith("the gallery has 100 images, protocol.gallery_images asks for 200")
    assert not evaluation_caveats(measured({"clean/mr_r1": (0.3, 0.2, 0.4)}), Protocol(attacks=(), gallery_images=100))


def test_what_is_foreseen() -> None:
    def told(images: int = 200, **fields: Any) -> list[str]:
        data = DataConfig(root=Path("photos"))
        found = foreseen(TrialConfig.model_validate({"data": data, **fields}), 812, images)
        assert not any(caveat.void for caveat in found)
        return [caveat.text for caveat in found]

    (scratch,) = told()
    assert "a tiny CLIP is trained from scratch on 812 images" in scratch
    assert "a tiny ALBEF" in told(model=ModelConfig(family="albef"))[0]
    assert told(model=ModelConfig(base="openai/clip-vit-base-patch16")) == []
    assert told(model=ModelConfig(image_tower="tower")) == []
    assert told(data=DataConfig()) == [], "shapes are learned in a minute"
    assert "57 images" in told(57, model=ModelConfig(base="clip"))[0]
