"""The front: points with their replicates taken together, their intervals, and how probable each one's place is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from study.config import Objective
from study.front.dominance import Floats, front_mask, measured, oriented
from study.records import Manifest, write_if_changed
from trainables.config import Model
from trainables.files import Location
from trainables.results import Metric

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


@dataclass(frozen=True)
class Estimate:
    """What is known of one point of the space.

    Attributes:
        runs: manifests of its complete runs, the first one first.
        metrics: mean of every objective over them, with its interval.
    """

    runs: tuple[Manifest, ...]
    metrics: dict[str, Metric]

    @property
    def first(self) -> Manifest:
        """Of its first run."""
        return self.runs[0]

    @property
    def replicates(self) -> int:
        """Complete runs."""
        return len(self.runs)


def estimates(manifests: Sequence[Manifest], objectives: Sequence[Objective]) -> list[Estimate]:
    """Complete trials with their replicates taken together, by key: nothing depends on the order in which they ended.

    All runs are evaluated on the same images, so the evaluation's variance stays as it is, and only that between the
    runs shrinks with their number: `variance = mean of (interval / 2 z)^2 + sample variance / runs`. A point with one
    run keeps its interval.
    """
    groups: dict[str, list[Manifest]] = {}
    for manifest in sorted(manifests, key=lambda manifest: (manifest.replicate, manifest.key)):
        if manifest.state == "complete":
            groups.setdefault(manifest.key.rsplit("-s", 1)[0], []).append(manifest)
    names = [objective.metric for objective in objectives]
    return [
        Estimate(tuple(runs), {name: mean_metric([measured(run, name) for run in runs]) for name in names})
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


def write_front(path: Location, entries: Sequence[FrontEntry]) -> None:
    """Write the front as JSON, atomically, and only if it differs from what is there."""
    write_if_changed(path, json.dumps([entry.model_dump(mode="json") for entry in entries], indent=1) + "\n")
