"""Measures, by hand: recalls, both success rates, RSUM and MMI."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainables.evaluation.measures import all_measures, attack_success, gallery_weights, recalls, rsum
from trainables.evaluation.retrieval import Ranks

OWNER = np.array([0, 0, 1, 1, 1])
CLEAN = Ranks(np.array([1, 6]), np.array([1, 2, 1, 11, 7]), OWNER)
ATTACKED = Ranks(np.array([3, 5]), np.array([2, 1, 12, 10, 7]), OWNER)
ONCE = np.ones((1, 2))


def value(measures: dict[str, np.ndarray], name: str) -> float:
    return float(measures[name][0])


def test_recalls_and_rsum_by_hand() -> None:
    found = recalls(CLEAN, (1, 5, 10), ONCE)
    assert [value(found, f"tr_r{k}") for k in (1, 5, 10)] == [1 / 2, 1 / 2, 1]
    assert [value(found, f"ir_r{k}") for k in (1, 5, 10)] == pytest.approx([2 / 5, 3 / 5, 4 / 5])
    assert value(found, "mr_r5") == pytest.approx((1 / 2 + 3 / 5) / 2)
    assert rsum(found)[0] == pytest.approx(1 / 2 + 1 / 2 + 1 + 2 / 5 + 3 / 5 + 4 / 5)


def test_weights_count_images_with_all_their_captions() -> None:
    found = recalls(CLEAN, (1,), np.array([[2.0, 1.0], [0.0, 2.0]]))
    assert found["tr_r1"].tolist() == [2 / 3, 0]
    assert found["ir_r1"].tolist() == pytest.approx([(2 + 1) / (4 + 3), 2 / 6])


def test_both_attack_success_rates_by_hand() -> None:
    found = all_measures({"clean": CLEAN, "both": ATTACKED}, (1, 5, 10), ONCE)
    assert value(found, "both/tr_asr_r1") == 1  # the only image answered is lost
    assert value(found, "both/ir_asr_r1") == 1  # both captions are, and another one was won
    assert value(found, "both/ir_drop_r1") == pytest.approx(2 / 5 - 1 / 5)
    assert value(found, "both/tr_asr_r5") == 0
    assert value(found, "both/tr_drop_r5") == pytest.approx(-1 / 2)  # the attack made a query right
    assert value(found, "both/ir_asr_r10") == pytest.approx(1 / 4)
    assert value(found, "both/mr_asr_r10") == pytest.approx(1 / 8)
    clean, attacked = value(found, "clean/rsum"), value(found, "both/rsum")
    assert value(found, "both/mmi") == pytest.approx((clean - attacked) / clean)
    assert not [name for name in found if name.startswith("clean/") and ("asr" in name or "mmi" in name)]


def test_nothing_to_lose_is_undefined() -> None:
    nothing = Ranks(np.array([20, 20]), np.full(5, 20), OWNER)
    assert np.isnan(attack_success(nothing, ATTACKED, (1,), ONCE)["tr_asr_r1"]).all()


@given(st.integers(0, 10**6))
def test_success_rate_bounds_attacked_recall(seed: int) -> None:
    """adv R@k >= clean R@k (1 - ASR), and equal exactly if no query became right."""
    draw = np.random.default_rng(seed)
    owner = np.repeat(np.arange(6), 3)
    clean, attacked = (Ranks(draw.integers(1, 4, 6), draw.integers(1, 4, 18), owner) for _ in range(2))
    found = all_measures({"clean": clean, "text": attacked}, (1,), np.ones((1, 6)))
    for direction, before, after in (("tr", clean.tr, attacked.tr), ("ir", clean.ir, attacked.ir)):
        if not (before <= 1).any():
            continue
        bound = value(found, f"clean/{direction}_r1") * (1 - value(found, f"text/{direction}_asr_r1"))
        won = ((before > 1) & (after <= 1)).mean()
        assert value(found, f"text/{direction}_r1") == pytest.approx(bound + won)


def test_galleries_are_drawn_once_and_for_all() -> None:
    weights = gallery_weights(7, 50, 3)
    assert (weights[0] == 1).all()
    assert (weights.sum(1) == 7).all()
    assert len(np.unique(weights, axis=0)) > 40
    np.testing.assert_array_equal(weights, gallery_weights(7, 50, 3))
