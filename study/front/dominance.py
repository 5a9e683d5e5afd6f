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


BLOCK = 128
"""Points that are compared with all others at once."""


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
    # In lexicographic order a point can only be dominated by an earlier one, which is no worse in the first cost.
    while len(left):
        points = costs[left]
        block = points[:BLOCK]
        first = ~_dominated(block, block)
        mask[left[:BLOCK][first]] = True
        left = left[BLOCK:][~_dominated(points[BLOCK:], block[first])]
    return mask


def _dominated(points: Floats, by: Floats) -> npt.NDArray[np.bool_]:
    """Which of the points, (n, m), some of the others, (k, m), dominate: bool (n,)."""
    no_worse = np.ones((len(points), len(by)), dtype=bool)
    better = np.zeros_like(no_worse)
    for one, other in zip(points.T, by.T, strict=True):
        no_worse &= other <= one[:, None]
        better |= other < one[:, None]
    found: npt.NDArray[np.bool_] = np.any(no_worse & better, axis=1)
    return found


def beaten(points: Floats, by: Floats) -> npt.NDArray[np.bool_]:
    """Which of the points, (n, m), some of the others, (k, m), are better than on every axis: bool (n,)."""
    blocks = [points[start : start + BLOCK] for start in range(0, len(points), BLOCK)]
    found = [np.logical_and.reduce(by.T[:, None] < block.T[:, :, None]).any(axis=1) for block in blocks]
    return np.concatenate(found) if found else np.zeros(0, dtype=bool)


def spread(costs: Floats, most: int) -> list[int]:
    """Places of a few points that stand for all: the best on each axis, then each time the one farthest from these.

    (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance", axes scaled to what the points span.)

    Args:
        costs: (n, m). Points with a NaN or an infinite cost are not chosen.
        most: places to return; fewer where one is best on several axes, or points are equal.

    Returns:
        In ascending order.
    """
    finite = np.flatnonzero(np.isfinite(costs).all(axis=1))
    points = costs[finite]
    if len(points) <= most:
        return finite.tolist()
    points = points / np.maximum(np.ptp(points, axis=0), np.finfo(float).tiny)
    chosen: list[int] = []
    away = np.full(len(points), np.inf)
    for turn in range(most):
        chosen.append(int(points[:, turn].argmin() if turn < points.shape[1] else away.argmax()))
        away = np.minimum(away, np.square(points - points[chosen[-1]]).sum(axis=1))
    return sorted(set(finite[chosen].tolist()))


class Archive:
    """Which of several points no other one dominates, see `front_mask`, while points come and change.

    Args:
        axes: of a point.
    """

    def __init__(self, axes: int) -> None:
        self._costs = np.full((64, axes), np.nan)
        self._best = np.zeros(64, dtype=bool)

    @property
    def costs(self) -> Floats:
        """Of the points that no other one dominates, (k, m)."""
        return self._costs[self._best]

    @property
    def places(self) -> list[int]:
        """Of the same."""
        return np.flatnonzero(self._best).tolist()

    def put(self, place: int, cost: Floats) -> None:
        """Have a point there; what was there goes.

        Args:
            place: 0 or more.
            cost: (m,).
        """
        if place >= len(self._best):
            more = max(len(self._best), place + 1 - len(self._best))
            self._costs = np.pad(self._costs, ((0, more), (0, 0)), constant_values=np.nan)
            self._best = np.pad(self._best, (0, more))
        freed: list[int] = []
        if self._best[place]:
            self._best[place] = False
            freed = np.flatnonzero(_dominated(self._costs, self._costs[[place]])).tolist()
        self._costs[place] = cost
        for each in (place, *freed):
            self._enter(each)

    def _enter(self, place: int) -> None:
        point = self._costs[[place]]
        if np.isfinite(point).all() and not _dominated(point, self.costs).any():
            self._best[self.places] = ~_dominated(self.costs, point)
            self._best[place] = True


def cost_of(manifest: Manifest, objectives: Sequence[Objective]) -> Floats:
    """What a trial measured, as costs, (m,)."""
    cost: Floats = oriented([measured(manifest, objective.metric).value for objective in objectives], objectives)[0]
    return cost
