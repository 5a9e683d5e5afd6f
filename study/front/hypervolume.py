"""What a front is worth: its hypervolume, how that grew, and what several seeds attain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from study.config import Objective
from study.front.dominance import Floats, complete_costs, front_mask
from study.records import Manifest

REFERENCE = 1.1
"""Reference point on every axis: 10 % of the range beyond the worse end."""


def hypervolume(costs: Floats, reference: float = REFERENCE) -> float:
    """Volume that the points dominate, between 0 and the reference on every axis. Exact.

    Each point adds what it dominates beyond the points better than it on the last axis (the exclusive volumes
    of While, Bradstreet and Barone 2012, "A fast way of calculating exact hypervolumes"). Limited to that
    point, the others lie in one slice of the last axis, so each step of the recursion has one axis less.

    Args:
        costs: (n, m), m >= 1. Costs below 0 count as 0; points at or beyond the reference count nothing.
        reference: the same on every axis.

    Returns:
        A volume in [0, reference ** m].
    """
    inside = costs[(costs < reference).all(axis=1)]
    return _volume(np.maximum(inside[front_mask(inside)], 0.0), reference)


def _volume(costs: Floats, reference: float) -> float:
    """As `hypervolume`, for points within the box."""
    if len(costs) == 0:
        return 0.0
    if costs.shape[1] == 1:
        return reference - float(costs.min())
    if costs.shape[1] == 2:
        by_first = costs[np.lexsort((costs[:, 1], costs[:, 0]))]
        floor = np.minimum.accumulate(np.concatenate([[reference], by_first[:, 1]]))
        return float(np.sum((reference - by_first[:, 0]) * (floor[:-1] - floor[1:])))
    worst_first = costs[np.argsort(-costs[:, -1], kind="stable")]
    total = 0.0
    for index, point in enumerate(worst_first[:, :-1]):
        limited = np.maximum(worst_first[index + 1 :, :-1], point)
        exclusive = float(np.prod(reference - point)) - _volume(limited[front_mask(limited)], reference)
        total += exclusive * (reference - float(worst_first[index, -1]))
    return total


def hypervolume_share(costs: Floats, reference: float = REFERENCE) -> float:
    """Hypervolume as a share of the whole box, in [0, 1]."""
    box: float = reference ** costs.shape[1]
    return hypervolume(costs, reference) / box


def attainment(fronts: Sequence[Floats], level: float) -> Floats:
    """The empirical attainment surface of several runs with two objectives (Watanabe 2023, arXiv 2305.08852).

    Args:
        fronts: costs of each run's points, (n, 2).
        level: share of the runs that must reach what lies beyond the surface, in (0, 1]; 0.5 is the median.

    Returns:
        (k, 2): for each first cost at which a run has a point, the smallest second cost that the share of runs reaches
        there; infinite where fewer reach any.
    """
    firsts = np.unique(np.concatenate([costs[:, 0] for costs in fronts]))
    reached = [[np.min(costs[costs[:, 0] <= first, 1], initial=math.inf) for first in firsts] for costs in fronts]
    needed = math.ceil(level * len(fronts) - 1e-9)
    return np.column_stack([firsts, np.sort(reached, axis=0)[needed - 1]])


def hypervolume_history(
    manifests: Sequence[Manifest], objectives: Sequence[Objective]
) -> list[tuple[float, int, float, float]]:
    """How the front grew: one row for each ended trial, in the order they ended.

    A point counts as it was measured first. Replicates, and trials that were stopped, infeasible or failed, add no
    volume, but they count and their device-seconds do.

    Returns:
        Rows of (time it ended, trials ended so far, device-seconds held so far, hypervolume share).
    """
    ordered = sorted(manifests, key=lambda manifest: (manifest.ended, manifest.key))
    costs = complete_costs(ordered, objectives)
    best = costs[:0]
    share, seconds = 0.0, 0.0
    rows = []
    for count, (manifest, cost) in enumerate(zip(ordered, costs, strict=True), 1):
        seconds += float(manifest.cost.get("device_seconds", 0.0))
        if np.isfinite(cost).all() and not (best <= cost).all(axis=1).any():
            best = np.vstack([best, cost])
            best = best[front_mask(best)]
            share = hypervolume_share(best)
        rows.append((manifest.ended, count, seconds, share))
    return rows
