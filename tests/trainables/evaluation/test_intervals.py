"""Intervals and paired differences, from ranks and from the bits of manifests."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from trainables.config import Protocol
from trainables.evaluation.intervals import (
    interval,
    paired_difference,
    recall_metrics,
    robustness_metrics,
    stored_ranks,
)
from trainables.evaluation.retrieval import Ranks
from trainables.evaluation.scores import correct_bits

DRAWS = {"samples": 400, "confidence": 0.9, "seed": 5}
AT = (1, 5, 10)


def measured(seed: int, images: int = 40, noise: float = 0.0) -> dict[str, Ranks]:
    """Images that are hard or easy for every model, and a model's own luck on top."""
    owner = np.repeat(np.arange(images), 1 + np.arange(images) % 3 * 2)
    hard = np.random.default_rng(0).gamma(2, 3, images)
    draw = np.random.default_rng(seed)

    def rank(base: np.ndarray) -> np.ndarray:
        return (1 + base * draw.uniform(1 - noise, 1 + noise, len(base))).astype(int)

    return {
        "clean": Ranks(rank(hard), rank(hard[owner]), owner),
        "both": Ranks(rank(2 * hard), rank(2 * hard[owner]), owner),
    }


def test_an_interval_is_percentiles_of_the_draws() -> None:
    got = interval(np.array([7.0, *range(101), np.nan]), 0.9)
    assert (got.value, got.low, got.high) == (7, pytest.approx(5), pytest.approx(95))


@pytest.mark.parametrize("images", [20, 300])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_a_recall_has_wilsons_interval(images: int, confidence: float) -> None:
    """Queries of different images are independent, so the reference is that of a binomial share."""
    terms = {"samples": 4000, "confidence": confidence, "seed": 1}
    for hits in sorted({0, 1, 2, images // 3, images - 1, images}):
        first = np.arange(images) < hits
        ranks = Ranks(np.where(first, 1, 9), np.where(first, 1, 9), np.arange(images))
        expected = binomtest(hits, images).proportion_ci(confidence, "wilson")
        for name, got in recall_metrics(ranks, (1,), **terms).items():
            assert got.value == pytest.approx(hits / images)
            assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.03 / images**0.5), name
            if hits in (0, images):  # no draw varies
                assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-9), name


def test_an_attack_that_always_succeeds_is_as_sure_as_what_there_was_to_lose() -> None:
    owner = np.repeat(np.arange(40), 2)
    clean = np.arange(40) < 3, (owner < 3) & (np.arange(80) % 2 == 0)
    ranks = {
        "clean": Ranks(*(np.where(answered, 1, 9) for answered in clean), owner),
        "both": Ranks(np.full(40, 9), np.full(80, 9), owner),
    }
    found, expected = robustness_metrics(ranks, (1,), **DRAWS), binomtest(3, 3).proportion_ci(0.9, "wilson")
    for name in ("tr", "ir", "mr"):
        got = found[f"both/{name}_asr_r1"]
        assert (got.value, got.low, got.high) == pytest.approx((1, expected.low, 1))


def test_intervals_agree_with_a_plain_bootstrap() -> None:
    ranks = measured(1, noise=0.3)["clean"]
    got = recall_metrics(ranks, AT, samples=4000, confidence=0.95, seed=0)["ir_r5"]
    draw, drawn = np.random.default_rng(9), []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(ranks.caption_image == i) for i in draw.integers(0, 40, 40)])
        drawn.append((ranks.ir[rows] <= 5).mean())
    assert got.value == pytest.approx((ranks.ir <= 5).mean())
    np.testing.assert_allclose([got.low, got.high], np.percentile(drawn, [2.5, 97.5]), atol=0.015)


def test_a_model_does_not_differ_from_itself() -> None:
    ranks = measured(1, noise=0.5)
    for metric in paired_difference(ranks, ranks, AT, **DRAWS).values():
        assert (metric.value, metric.low, metric.high) == (0, 0, 0)


def test_pairing_sees_a_difference_that_separate_intervals_hide() -> None:
    first, second = measured(1), measured(1)
    for name in second:  # the same model, except that it misses two images more
        second[name].tr[np.flatnonzero(second[name].tr <= 5)[:2]] = 99
    got = paired_difference(first, second, AT, **DRAWS)["clean/tr_r5"]
    apart = [robustness_metrics(ranks, AT, **DRAWS)["clean/tr_r5"] for ranks in (first, second)]
    assert got.value == pytest.approx(apart[0].value - apart[1].value) == pytest.approx(2 / 40)
    assert got.low >= 0
    assert got.high - got.low < 0.6 * (apart[0].high - apart[0].low)
    assert paired_difference(second, first, AT, **DRAWS)["clean/tr_r5"].value == -got.value


def test_stored_bits_say_all_that_is_needed() -> None:
    protocol, first, second = Protocol(recall_at=AT), measured(1, noise=0.5), measured(2, noise=0.5)
    owner = first["clean"].caption_image
    queries = {"tr": 40, "ir": len(owner)}
    stored = [stored_ranks(correct_bits(ranks, protocol), queries, owner) for ranks in (first, second)]
    assert robustness_metrics(stored[0], AT, **DRAWS) == robustness_metrics(first, AT, **DRAWS)
    assert paired_difference(*stored, AT, **DRAWS) == paired_difference(first, second, AT, **DRAWS)
    with pytest.raises(ValueError, match="measured on"):
        stored_ranks(correct_bits(first, protocol), queries, owner[:-1])


@pytest.mark.parametrize(
    ("data_set", "published"),
    [
        ("flickr30k", {"tr": (0.8150, 0.9630, 0.9840), "ir": (0.6208, 0.8562, 0.9172)}),
        ("mscoco", {"tr": (0.5242, 0.7644, 0.8442), "ir": (0.3302, 0.5816, 0.6884)}),
    ],
)
def test_recalls_of_a_published_model(real_data: Path, data_set: str, published: dict[str, tuple[float, ...]]) -> None:
    """CLIP ViT-B/16 on whole test splits, from the lists of answered queries that SGA's authors give."""
    if data_set == "mscoco":
        pictures = json.loads((real_data / "coco_karpathy_test_captions.json").read_text())
        captions = [len(picture["caption"]) for picture in pictures]
    else:
        captions = [5] * 1000
    owner = np.repeat(np.arange(len(captions)), captions)
    queries = {"tr": len(captions), "ir": len(owner)}
    with np.load(real_data / "sga_clean_rank_sets" / f"{data_set}.npz") as answered:
        bits = {
            f"clean/{direction}_r{k}": np.isin(np.arange(size), answered[f"CLIP_ViT_{direction}{k}"])
            for direction, size in queries.items()
            for k in AT
        }
    correct = {name: base64.b64encode(np.packbits(values).tobytes()).decode() for name, values in bits.items()}
    found = robustness_metrics(stored_ranks(correct, queries, owner), AT, **DRAWS)
    for direction, values in published.items():
        got = [found[f"clean/{direction}_r{k}"].value for k in AT]
        assert got == pytest.approx(values, abs=5e-5)
    assert found["clean/rsum"].value == pytest.approx(sum(map(sum, published.values())), abs=3e-4)
    ir = found["clean/ir_r1"]
    binomial = 2 * 1.645 * (ir.value * (1 - ir.value) / len(owner)) ** 0.5
    assert (
        1.05 < (ir.high - ir.low) / binomial < 2.24
    )  # wider, because an image's captions go together; sqrt(5) at most


def test_different_galleries_are_not_compared() -> None:
    ranks = measured(1)
    other = {name: Ranks(found.tr, found.ir, found.caption_image[::-1]) for name, found in ranks.items()}
    with pytest.raises(ValueError, match="different galleries"):
        paired_difference(ranks, other, AT, **DRAWS)


def test_what_is_undefined_is_left_out() -> None:
    ranks = measured(1)
    ranks["clean"] = Ranks(ranks["clean"].tr + 99, ranks["clean"].ir, ranks["clean"].caption_image)
    found = robustness_metrics(ranks, AT, **DRAWS)
    assert "both/tr_asr_r1" not in found
    assert "both/ir_asr_r1" in found
    assert "both/tr_drop_r1" in found
