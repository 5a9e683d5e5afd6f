"""Expected robustness, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from trainables.evaluation.expected import expected_robustness, uniform_weights
from trainables.evaluation.intervals import recall_metrics
from trainables.evaluation.retrieval import Ranks

DRAWS = {"samples": 300, "confidence": 0.9, "seed": 1}
OWNER = np.arange(20)


def answered(count: int) -> Ranks:
    """The first `count` of 20 images, each with a caption, are answered."""
    ranks = np.where(count > OWNER, 1, 9)
    return Ranks(ranks, ranks, OWNER)


def test_uniform_weights_are_the_trapezoidal_rule() -> None:
    weights = uniform_weights([(0.0, 0), (0.0, 1), (0.1, 0), (0.1, 1), (0.4, 0), (0.4, 1)])
    assert sum(weights.values()) == pytest.approx(1)
    assert weights[0.1, 0] == weights[0.1, 1] == pytest.approx(0.25)
    assert weights[0.4, 1] == pytest.approx(0.1875)
    assert uniform_weights([(0.1, 1)]) == {(0.1, 1): 1.0}
    with pytest.raises(ValueError, match="no full grid of 2 epsilons x 2 words"):
        uniform_weights([(0.0, 0), (0.1, 0), (0.1, 1)])


def test_expected_robustness_by_hand() -> None:
    grid = {(0.0, 1): answered(16), (0.1, 1): answered(8), (0.4, 1): answered(2)}
    got = expected_robustness(grid, "tr_r1", **DRAWS)
    assert got.expected.value == pytest.approx(0.125 * 0.8 + 0.5 * 0.4 + 0.375 * 0.1)
    assert got.table[0.1, 1] == recall_metrics(grid[0.1, 1], (1,), **DRAWS)["tr_r1"]
    weighted = expected_robustness(grid, "mr_r1", weights={(0.0, 1): 1, (0.1, 1): 3, (0.4, 1): 0}, **DRAWS)
    assert weighted.expected.value == pytest.approx((0.8 + 3 * 0.4) / 4)
    assert expected_robustness({(0.1, 1): answered(8)}, "rsum", **DRAWS).expected.value == pytest.approx(
        2 * (0.4 + 0.4 + 1)
    )
    with pytest.raises(ValueError, match="one number for each budget"):
        expected_robustness(grid, weights={(0.0, 1): 1}, **DRAWS)


def test_budgets_are_resampled_together() -> None:
    """Equal results at every budget: the mean is as uncertain as each, not surer by averaging."""
    grid = {(epsilon, 1): answered(10) for epsilon in (0.0, 0.1, 0.2, 0.3)}
    got = expected_robustness(grid, "tr_r1", **DRAWS)
    assert got.expected.low == pytest.approx(got.table[0.0, 1].low)
    assert got.expected.high == pytest.approx(got.table[0.0, 1].high)
