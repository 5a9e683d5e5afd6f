"""The front: points with their replicates taken together, their intervals, and how probable each one's place is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from study.config import Objective
from study.front.dominance import Archive, Floats, beaten, front_mask, measured, oriented, spread
from study.records import Manifest, write_if_changed
from trainables.config import Model, Protocol
from trainables.files import Location
from trainables.results import Metric

NEAR = 0.05
"""Probability of being on the front from which a trial is near it."""

SHOWN = 150
"""Searched points of a front that are shown; of a front of thousands nobody reads more."""

DRAWS = 400

CONFIDENCE = Protocol().confidence


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


def deviations_in(confidence: float) -> float:
    """Half the width of a normal distribution's interval, in standard deviations; of its 95 % interval 1.96."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def estimates(
    manifests: Sequence[Manifest], objectives: Sequence[Objective], confidence: float = CONFIDENCE
) -> list[Estimate]:
    """Complete trials with their replicates taken together, by key: nothing depends on the order in which they ended.

    All runs are evaluated on the same images, so the evaluation's variance stays as it is, and only that between the
    runs shrinks with their number: `variance = mean of (interval / 2 z)^2 + sample variance / runs`. A point with one
    run keeps its interval.
    """
    groups: dict[str, list[Manifest]] = {}
    for manifest in sorted(manifests, key=_place):
        if manifest.state == "complete":
            groups.setdefault(_point(manifest), []).append(manifest)
    return [_estimate(runs, objectives, confidence) for runs in groups.values() if runs[0].replicate == 0]


def _place(manifest: Manifest) -> tuple[int, str]:
    return manifest.replicate, manifest.key


def _point(manifest: Manifest) -> str:
    """What replicates have in common."""
    return manifest.key.rsplit("-s", 1)[0]


def _estimate(runs: Sequence[Manifest], objectives: Sequence[Objective], confidence: float) -> Estimate:
    names = [objective.metric for objective in objectives]
    return Estimate(
        tuple(runs), {name: mean_metric([measured(run, name) for run in runs], confidence) for name in names}
    )


def mean_metric(runs: Sequence[Metric], confidence: float = CONFIDENCE) -> Metric:
    """Mean of a metric over runs that were evaluated on the same images, with the interval of `estimates`."""
    if len(runs) == 1:
        return runs[0]
    z = deviations_in(confidence)
    values = np.array([run.value for run in runs])
    within = np.mean([((run.high - run.low) / (2 * z)) ** 2 for run in runs])
    half = z * math.sqrt(within + values.var(ddof=1) / len(runs))
    return Metric(value=values.mean(), low=values.mean() - half, high=values.mean() + half)


def excerpt(found: Sequence[Estimate], objectives: Sequence[Objective]) -> list[Estimate]:
    """All recipes, and at most `SHOWN` searched points, spread over the objectives; in their order."""
    costs, *_ = costs_of([list(one.metrics.values()) for one in found], objectives)
    searched = np.array([one.first.recipe is None for one in found], dtype=bool)
    if searched.sum() <= SHOWN:
        return list(found)
    costs[~searched] = np.nan
    kept = sorted([*spread(costs, SHOWN), *np.flatnonzero(~searched).tolist()])
    return [found[place] for place in kept]


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
    drawn = np.ascontiguousarray((values + deviations * errors).T)  # by axis, point and draw
    least, most = drawn.min(axis=2), drawn.max(axis=2)
    shares = np.zeros(len(values))
    for index in np.flatnonzero(np.isfinite(least + most).all(axis=0)):
        near = np.logical_and.reduce(least <= most[:, [index]])  # may dominate it in some draw
        near[index] = False
        others, point = drawn[:, near], drawn[:, [index]]
        no_worse = np.logical_and.reduce(others <= point)
        shares[index] = np.mean(~(no_worse & np.logical_or.reduce(others < point)).any(axis=0))
    return shares


def _places_of(found: Sequence[Estimate], objectives: Sequence[Objective], confidence: float) -> tuple[Floats, Floats]:
    """Costs of the estimates, (n, m), and how probable it is that each is on the front; what is far is not drawn."""
    costs, best, worst = costs_of([list(estimate.metrics.values()) for estimate in found], objectives)
    near = ~beaten(best, worst[front_mask(worst)])
    probabilities = np.zeros(len(found))
    deviations = (worst - best) / (2 * deviations_in(confidence))
    probabilities[near] = front_probability(costs[near], deviations[near])
    return costs, probabilities


def costs_of(metrics: Sequence[Sequence[Metric]], objectives: Sequence[Objective]) -> tuple[Floats, Floats, Floats]:
    """Costs of n points, (n, m), and those of the better and the worse ends of their intervals."""
    ends = ("value", "low", "high")
    costs, *others = (
        oriented([[getattr(metric, end) for metric in row] for row in metrics], objectives) for end in ends
    )
    return costs, np.minimum(*others), np.maximum(*others)


class Members:
    """Which points are on the front, as one trial ends after the other: those of `front`.

    Args:
        objectives: of the study.
        confidence: of the intervals.
        manifests: what ended before.
    """

    def __init__(
        self, objectives: Sequence[Objective], confidence: float = CONFIDENCE, manifests: Iterable[Manifest] = ()
    ) -> None:
        self._objectives, self._confidence = objectives, confidence
        self._runs: dict[str, dict[tuple[int, str], list[Metric]]] = {}
        self._places: dict[str, int] = {}
        self._costs, self._worst = Archive(len(objectives)), Archive(len(objectives))
        for manifest in manifests:
            self.add(manifest)

    @property
    def keys(self) -> frozenset[str]:
        """Of the trials on the front, the first ones of their points."""
        keys = list(self._places)
        return frozenset(keys[place] for place in self._costs.places)

    def add(self, manifest: Manifest) -> bool:
        """Account for an ended trial; whether `front` is now another one, in its points or their probabilities."""
        if manifest.state != "complete":
            return False
        runs = self._runs.setdefault(_point(manifest), {})
        runs[_place(manifest)] = [measured(manifest, objective.metric) for objective in self._objectives]
        (first, key), *_ = order = sorted(runs)
        if first:  # the point's first run is not there yet
            return False
        known = key in self._places
        place = self._places.setdefault(key, len(self._places))
        metrics = [mean_metric(metric, self._confidence) for metric in zip(*(runs[one] for one in order), strict=True)]
        cost, best, worst = costs_of([metrics], self._objectives)
        near = not beaten(best, self._worst.costs)[0]
        self._costs.put(place, cost[0])
        self._worst.put(place, worst[0])
        return known or near


def near_front(
    manifests: Sequence[Manifest], objectives: Sequence[Objective], confidence: float = CONFIDENCE
) -> set[str]:
    """Keys of the complete trials that are on the front or may be, see `NEAR`."""
    found = estimates(manifests, objectives, confidence)
    costs, probabilities = _places_of(found, objectives, confidence)
    return {found[index].first.key for index in np.flatnonzero((probabilities >= NEAR) | front_mask(costs))}


def front(
    manifests: Sequence[Manifest], objectives: Sequence[Objective], confidence: float = CONFIDENCE
) -> list[FrontEntry]:
    """The non-dominated complete points, best in the first objective first; replicates are taken together.

    Args:
        manifests: the ended trials.
        objectives: of the study.
        confidence: of the intervals, `protocol.confidence`.
    """
    found = estimates(manifests, objectives, confidence)
    costs, probabilities = _places_of(found, objectives, confidence)
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
