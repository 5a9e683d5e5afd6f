"""The front and its hypervolume: what a study found, and how fast.

Pure functions over arrays and manifests. A cost is an objective turned to minimisation and scaled so that its
declared range is [0, 1].
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from study.config import Objective
from study.records import Manifest, write_atomically
from trainables.config import Metric, Model

Floats = npt.NDArray[np.float64]

REFERENCE = 1.1
"""Reference point on every axis: 10 % of the range beyond the worse end."""

DEVICE_SECONDS = "cost/device_seconds"
"""The objective that is read from the cost of a trial, not from its evaluation."""


class FrontEntry(Model):
    """One non-dominated trial."""

    key: str
    params: dict[str, Any]
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    recipe: str | None = None


def measured(manifest: Manifest, metric: str) -> Metric:
    """An objective's value with its interval; NaN where the trial has none."""
    if metric == DEVICE_SECONDS:
        seconds = float(manifest.cost.get("device_seconds", math.nan))
        return Metric(value=seconds, low=seconds, high=seconds)
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
    low = np.array([objective.low for objective in objectives])
    high = np.array([objective.high for objective in objectives])
    maximised = np.array([objective.direction == "maximize" for objective in objectives])
    costs: Floats = np.where(maximised, high - array, array - low) / (high - low)
    return costs


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


def complete_costs(manifests: Sequence[Manifest], objectives: Sequence[Objective]) -> Floats:
    """Costs of the given trials, (n, m); NaN for one that is not complete, so that no front takes it."""
    values = [
        [
            measured(manifest, objective.metric).value if manifest.state == "complete" else math.nan
            for objective in objectives
        ]
        for manifest in manifests
    ]
    return oriented(values, objectives)


def front(manifests: Sequence[Manifest], objectives: Sequence[Objective]) -> list[FrontEntry]:
    """The non-dominated complete trials, best in the first objective first."""
    costs = complete_costs(manifests, objectives)
    members = sorted(
        np.flatnonzero(front_mask(costs)).tolist(), key=lambda index: (*costs[index], manifests[index].key)
    )
    return [_entry(manifests[index], objectives) for index in members]


def _entry(manifest: Manifest, objectives: Sequence[Objective]) -> FrontEntry:
    metrics = {objective.metric: measured(manifest, objective.metric) for objective in objectives}
    return FrontEntry(
        key=manifest.key,
        params=manifest.params,
        values={name: metric.value for name, metric in metrics.items()},
        intervals={name: (metric.low, metric.high) for name, metric in metrics.items()},
        recipe=manifest.recipe,
    )


def hypervolume_history(
    manifests: Sequence[Manifest], objectives: Sequence[Objective]
) -> list[tuple[float, int, float, float]]:
    """How the front grew: one row for each ended trial, in the order they ended.

    Trials that ended infeasible or failed add no volume, but they count and their device-seconds do.

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
        candidates = np.vstack([best, cost])
        mask = front_mask(candidates)
        if mask[-1]:
            best = candidates[mask]
            share = hypervolume_share(best)
        rows.append((manifest.ended, count, seconds, share))
    return rows


def write_front(path: Path, entries: Sequence[FrontEntry]) -> None:
    """Write the front as JSON, atomically, and only if it differs from what is there."""
    write_if_changed(path, json.dumps([entry.model_dump(mode="json") for entry in entries], indent=1) + "\n")


def write_if_changed(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically, and leave its time alone where nothing changed."""
    if not path.exists() or path.read_text() != text:
        write_atomically(path, text)
