"""Expected robustness: one number for a model over a grid of attack strengths instead of one strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainables.evaluation.intervals import interval, share_interval
from trainables.evaluation.measures import gallery_weights, recalls, rsum
from trainables.evaluation.retrieval import Ranks
from trainables.results import Metric

Budget = tuple[float, int]
"""Epsilon in [0, 1] pixels, and words."""


@dataclass(frozen=True)
class ExpectedRobustness:
    """A measure over a grid of budgets.

    Attributes:
        expected: weighted mean of `table`.
        table: the measure at each budget.
        weights: of the budgets; their sum is 1.
    """

    expected: Metric
    table: dict[Budget, Metric]
    weights: dict[Budget, float]


def uniform_weights(budgets: Sequence[Budget]) -> dict[Budget, float]:
    """Weights of a full grid for an attacker whose epsilon is uniform from its smallest to its largest value there.

    Over epsilon by the trapezoidal rule, so that values may be anywhere; every number of words is as likely. A single
    epsilon has all the weight.

    Example:
        >>> uniform_weights([(0.0, 1), (0.25, 1), (1.0, 1)])
        {(0.0, 1): 0.125, (0.25, 1): 0.5, (1.0, 1): 0.375}

    Raises:
        ValueError: a combination is missing.
    """
    epsilons, words = (sorted(set(values)) for values in zip(*budgets, strict=True))
    if len(budgets) != len(epsilons) * len(words) or len(set(budgets)) != len(budgets):
        raise ValueError(f"{len(budgets)} budgets are no full grid of {len(epsilons)} epsilons x {len(words)} words")
    share = np.ones(1) if len(epsilons) == 1 else np.convolve(np.diff(epsilons), [0.5, 0.5])
    share = share / share.sum() / len(words)
    return {budget: float(share[epsilons.index(budget[0])]) for budget in budgets}


def expected_robustness(
    ranks: Mapping[Budget, Ranks],
    metric: str = "mr_r1",
    *,
    weights: Mapping[Budget, float] | None = None,
    samples: int,
    confidence: float,
    seed: int,
) -> ExpectedRobustness:
    """The mean of a measure over attack strengths, as in epsilon scheduling (arXiv 2509.23325) over epsilon alone.

    All budgets are resampled together, so the interval of the mean is right although they share their images.

    Args:
        ranks: on one gallery, under attacks of each budget; (0, 0) is clean.
        metric: `tr_r1`, `ir_r5`, `mr_r10` and so on, or `rsum` (of R@1, R@5 and R@10).
        weights: of the budgets, not negative; `uniform_weights` if not given. Divided by their sum.
        samples: galleries drawn.
        confidence: of the intervals.
        seed: of the draws.

    Raises:
        ValueError: weights and ranks do not have the same budgets, or weights are no distribution.
    """
    weights = uniform_weights(list(ranks)) if weights is None else weights
    total = sum(weights.values())
    if set(weights) != set(ranks) or min(weights.values()) < 0 or total <= 0:
        raise ValueError("weights need one number for each budget of ranks, none negative and not all zero")
    share = {budget: weights[budget] / total for budget in ranks}
    drawn = gallery_weights(len(next(iter(ranks.values())).tr), samples, seed)
    measures = {budget: _measure(found, metric, drawn) for budget, found in ranks.items()}
    mean = np.sum([share[budget] * measure for budget, measure in measures.items()], axis=0)
    images = drawn.shape[1]

    def told(measure: np.ndarray) -> Metric:
        return interval(measure, confidence) if metric == "rsum" else share_interval(measure, images, confidence)

    return ExpectedRobustness(told(mean), {budget: told(measure) for budget, measure in measures.items()}, share)


def _measure(ranks: Ranks, metric: str, drawn: np.ndarray) -> np.ndarray:
    if metric == "rsum":
        return rsum(recalls(ranks, (1, 5, 10), drawn))
    k = int(metric.rpartition("_r")[2])
    return recalls(ranks, (k,), drawn)[metric]
