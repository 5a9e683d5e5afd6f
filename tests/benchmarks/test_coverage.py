"""Intervals of simulated studies hold what is true as often as they say; the whole table is `benchmarks.coverage`."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.coverage import CONFIDENCE, covered


@pytest.mark.parametrize("runs", [1, 3])
def test_intervals_hold_what_is_true(runs: int) -> None:
    found = covered(studies=60, points=6, runs=runs, images=120, seed_deviation=0.2)
    for name, held in (("values", found.values), ("differences", found.differences)):
        # Values of a study go together: about two of its twelve are worth an independent one.
        doubt = 3 * (CONFIDENCE * (1 - CONFIDENCE) / 120) ** 0.5
        assert abs(np.mean(held) - CONFIDENCE) < doubt, name
    assert np.mean(found.widths) < 0.9 * np.mean(found.apart), "pairing is worth something"
    assert found.near >= 0.95
    share = sum(found.said) / sum(found.came)
    assert 0.9 < share < 1.1 if runs == 1 else share < 1.1, "with seeds, probabilities are cautious"
