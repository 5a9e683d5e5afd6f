"""Costs, and which of them no other dominates.

A cost is an objective turned to minimisation and scaled so that its declared range is [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from study.config import COSTS, Objective
from study.records import Manifest
from trainables.results import Metric

Floats = npt.NDArray[np.float64]


def measured(manifest: Manifest, metric: str) -> Metric:
    """A metric's value with its interval, which a cost has not; NaN where the trial has none."""
    if metric in COSTS:
        cost = manifest.cost.get(COSTS[metric])
        value = math.nan if cost is None else float(cost)
        return Metric(value=value, low=value, high=value)
    return manifest.metrics.get(metric, Metric(value=math.nan, low=math.nan, high=math.nan))


def oriented(values: npt.ArrayLike, objectives: Sequence[Objective]) -> Floats:
    """Costs: 0 at the better end of each objective's range, 1 at the worse end.

    Values outside of the range give costs outside of [0, 1], so that they still compare.

    Args:
        values: measured values, (n, m), columns in the order of `objectives`.
        objectives: m objectives.

    Returns:
        Costs, (n, m).
    """
    array = np.asarray(values, dtype=np.float64).reshape(-1, len(objectives))
    low, high, maximised = _ranges(objectives)
    costs: Floats = np.where(maximised, high - array, array - low) / (high - low)
    return costs


def values_at(costs: Floats, objectives: Sequence[Objective]) -> Floats:
    """The values, (n, m), that have the costs, (n, m): the inverse of `oriented`."""
    low, high, maximised = _ranges(objectives)
    values: Floats = np.where(maximised, high - costs * (high - low), low + costs * (high - low))
    return values


def _ranges(objectives: Sequence[Objective]) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    low = np.array([objective.low for objective in objectives])
    high = np.array([objective.high for objective in objectives])
    return low, high, np.array([objective.direction == "maximize" for objective in objectives])


def front_mask(costs: Floats) -> npt.NDArray[np.bool_]:
    """Which points no other one dominates.

    Equal points do not dominate each other, so all copies stay. A point with a NaN or an infinite cost
    neither stays nor dominates.

    Args:
        costs: (n, m), smaller is better.

    Returns:
        bool (n,).
    """
    mask = np.zeros(len(costs), dtype=bool)
    order = np.lexsort(costs.T[::-1])
    left = order[np.isfinite(costs[order]).all(axis=1)]
    # In lexicographic order a point can only be dominated by an earlier one, so the first that is left is on the front.
    while len(left):
        point, others = costs[left[0]], costs[left]
        mask[left[(others == point).all(axis=1)]] = True
        left = left[(others < point).any(axis=1)]
    return mask


def complete_costs(manifests: Sequence[Manifest], objectives: Sequence[Objective]) -> Floats:
    """Costs of the given trials, (n, m); NaN for replicates and what is not complete, so that no front takes them."""
    values = [
        [
            measured(manifest, objective.metric).value
            if manifest.state == "complete" and not manifest.replicate
            else math.nan
            for objective in objectives
        ]
        for manifest in manifests
    ]
    return oriented(values, objectives)
