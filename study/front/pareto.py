"""The front and its hypervolume: what a study found, and how fast.

Pure functions over arrays and manifests. A cost is an objective turned to minimisation and scaled so that its
declared range is [0, 1].
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from study.config import COSTS, Objective
from study.records import Manifest, write_atomically
from trainables.config import Model
from trainables.results import Metric

Floats = npt.NDArray[np.float64]

REFERENCE = 1.1
"""Reference point on every axis: 10 % of the range beyond the worse end."""

Z95 = 1.959964
"""Half the width of a normal distribution's 95 % interval, in standard deviations."""

NEAR = 0.05
"""Probability of being on the front from which a trial is near it."""

DRAWS = 400


class FrontEntry(Model):
    """One non-dominated point: a trial, or the mean of its replicates."""

    key: str
    params: dict[str, Any]
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    recipe: str | None = None
    replicates: int = 1
    probability: float = 1.0


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


@dataclass(frozen=True)
class Estimate:
    """What is known of one point of the space.

    Attributes:
        first: manifest of its first run.
        replicates: complete runs.
        metrics: mean of every objective over them, with its interval.
    """

    first: Manifest
    replicates: int
    metrics: dict[str, Metric]


def estimates(manifests: Sequence[Manifest], objectives: Sequence[Objective]) -> list[Estimate]:
    """Complete trials with their replicates taken together, in the order of their first runs.

    All runs are evaluated on the same images, so the evaluation's variance stays as it is, and only that between the
    runs shrinks with their number: `variance = mean of (interval / 2 z)^2 + sample variance / runs`. A point with one
    run keeps its interval.
    """
    groups: dict[str, list[Manifest]] = {}
    for manifest in sorted(manifests, key=lambda manifest: manifest.replicate):
        if manifest.state == "complete":
            groups.setdefault(manifest.key.rsplit("-s", 1)[0], []).append(manifest)
    names = [objective.metric for objective in objectives]
    return [
        Estimate(runs[0], len(runs), {name: mean_metric([measured(run, name) for run in runs]) for name in names})
        for runs in groups.values()
        if runs[0].replicate == 0
    ]


def mean_metric(runs: Sequence[Metric]) -> Metric:
    """Mean of a metric over runs that were evaluated on the same images, with the interval of `estimates`."""
    if len(runs) == 1:
        return runs[0]
    values = np.array([run.value for run in runs])
    within = np.mean([((run.high - run.low) / (2 * Z95)) ** 2 for run in runs])
    half = Z95 * math.sqrt(within + values.var(ddof=1) / len(runs))
    return Metric(value=values.mean(), low=values.mean() - half, high=values.mean() + half)


def front_probability(values: Floats, deviations: Floats, draws: int = DRAWS, seed: int = 0) -> Floats:
    """How probable it is that no other point dominates each one, if every value has a normal error of its own.

    Args:
        values: costs, (n, m), smaller is better.
        deviations: their standard deviations, (n, m).
        draws: from all errors at once.
        seed: of the draws.

    Returns:
        (n,), in [0, 1].
    """
    errors = np.random.default_rng(seed).standard_normal((draws, *values.shape))
    shares = [front_mask(values + deviations * error) for error in errors]
    return np.mean(shares, axis=0) if len(values) else np.zeros(0)


def _probabilities(found: Sequence[Estimate], objectives: Sequence[Objective]) -> Floats:
    """Probability of being on the front for each estimate; those that are far from it are not drawn."""
    metrics = [[estimate.metrics[objective.metric] for objective in objectives] for estimate in found]
    ends = [
        oriented([[getattr(metric, end) for metric in row] for row in metrics], objectives) for end in ("low", "high")
    ]
    worst, best = np.maximum(*ends), np.minimum(*ends)
    bound = worst[front_mask(worst)]
    candidates = np.flatnonzero([not (bound < row).all(axis=1).any() for row in best])
    costs = oriented([[metric.value for metric in row] for row in metrics], objectives)[candidates]
    probabilities = np.zeros(len(found))
    probabilities[candidates] = front_probability(costs, ((worst - best) / (2 * Z95))[candidates])
    return probabilities


def near_front(manifests: Sequence[Manifest], objectives: Sequence[Objective]) -> set[str]:
    """Keys of the complete trials that are on the front or may be, see `NEAR`."""
    found = estimates(manifests, objectives)
    return {
        estimate.first.key
        for estimate, probability in zip(found, _probabilities(found, objectives), strict=True)
        if probability >= NEAR
    } | {entry.key for entry in front(manifests, objectives)}


def front(manifests: Sequence[Manifest], objectives: Sequence[Objective]) -> list[FrontEntry]:
    """The non-dominated complete points, best in the first objective first; replicates are taken together."""
    found = estimates(manifests, objectives)
    costs = oriented([[e.metrics[o.metric].value for o in objectives] for e in found], objectives)
    probabilities = _probabilities(found, objectives)
    members = sorted(
        np.flatnonzero(front_mask(costs)).tolist(), key=lambda index: (*costs[index], found[index].first.key)
    )
    return [
        FrontEntry(
            key=found[index].first.key,
            params=found[index].first.params,
            values={name: metric.value for name, metric in found[index].metrics.items()},
            intervals={name: (metric.low, metric.high) for name, metric in found[index].metrics.items()},
            recipe=found[index].first.recipe,
            replicates=found[index].replicates,
            probability=float(probabilities[index]),
        )
        for index in members
    ]


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


def write_front(path: Path, entries: Sequence[FrontEntry]) -> None:
    """Write the front as JSON, atomically, and only if it differs from what is there."""
    write_if_changed(path, json.dumps([entry.model_dump(mode="json") for entry in entries], indent=1) + "\n")


def write_if_changed(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically, and leave its time alone where nothing changed."""
    if not path.exists() or path.read_text() != text:
        write_atomically(path, text)
