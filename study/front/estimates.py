"""The front: points with their replicates taken together, their intervals, and how probable each one's place is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from study.config import COSTS, Objective
from study.front.dominance import Archive, Floats, beaten, front_mask, measured, oriented, spread
from study.front.paired import (
    UNKNOWN,
    Answered,
    TrainingNoise,
    is_known,
    mean_errors,
    student_deviations,
    training_noise,
)
from study.records import Manifest, write_if_changed
from trainables.config import TEST, Model, Protocol, SplitName
from trainables.files import Location
from trainables.results import Metric

NEAR = 0.05
"""Probability of being on the front from which a trial is near it."""

SHOWN = 150
"""Searched points of a front that are shown; of a front of thousands nobody reads more."""

CHANCES = 400
"""Draws of a probability."""

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
    split: SplitName = TEST
    """Whose images were measured."""


@dataclass(frozen=True)
class Estimate:
    """What is known of one point of the space.

    Attributes:
        runs: manifests of its complete runs, the first one first.
        metrics: mean of every objective over them, with its interval.
        training: what other seeds would change; of all points alike.
    """

    runs: tuple[Manifest, ...]
    metrics: dict[str, Metric]
    training: TrainingNoise

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

    Without replicates values are those of the models that were trained, with intervals over images. With some, all are
    those of the points, each run of which might have had another seed: see `study.front.paired`. The two halves of an
    interval are the roots of the sums of both kinds' squares, Student's t for the seeds (Zou and Donner 2008,
    "Construction of confidence limits about effect measures: a general approach").
    """
    groups: dict[str, list[Manifest]] = {}
    for manifest in sorted(manifests, key=_place):
        if manifest.state == "complete":
            groups.setdefault(_point(manifest), []).append(manifest)
    points = [runs for runs in groups.values() if runs[0].replicate == 0]
    names = [objective.metric for objective in objectives]
    repeated = [runs for runs in points if len(runs) > 1]
    values = [np.array([[measured(run, name).value for name in names] for run in runs]) for runs in repeated]
    training = training_noise(repeated, values, names)
    return [
        Estimate(
            tuple(runs),
            {
                name: _widened(metric, training.half(name, len(runs), confidence), name)
                for name, metric in over_images(runs, names, confidence).items()
            },
            training,
        )
        for runs in points
    ]


def _place(manifest: Manifest) -> tuple[int, str]:
    return manifest.replicate, manifest.key


def _point(manifest: Manifest) -> str:
    """What replicates have in common."""
    return manifest.key.rsplit("-s", 1)[0]


def over_images(runs: Sequence[Manifest], names: Sequence[str], confidence: float) -> dict[str, Metric]:
    """Means of the objectives over a point's runs, with intervals over images alone."""
    found = {name: _mean([measured(run, name) for run in runs]) for name in names}
    if len(runs) == 1 or not is_known(runs, names):
        return found
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    ends = np.quantile(mean_errors([runs], names)[0], tails, axis=1).T.tolist()
    for (name, mean), (low, high) in zip(found.items(), ends, strict=True):
        if low < 0 < high:  # not where no gallery differs
            found[name] = Metric(value=mean.value, low=mean.value + low, high=mean.value + high)
    return found


def _mean(runs: Sequence[Metric]) -> Metric:
    """Of runs that were measured on the same images, so that their number makes no interval narrower."""
    value, low, high = np.mean([(run.value, run.low, run.high) for run in runs], axis=0).tolist()
    return Metric(value=value, low=low, high=high)


def _widened(metric: Metric, half: float, name: str) -> Metric:
    if not half:
        return metric
    low = metric.value - math.hypot(metric.value - metric.low, half)
    high = metric.value + math.hypot(metric.high - metric.value, half)
    if name not in COSTS:  # a recall
        low, high = min(metric.value, max(0.0, low)), max(metric.value, min(1.0, high))
    return Metric(value=metric.value, low=low, high=high)


def mean_metric(runs: Sequence[Metric], confidence: float = CONFIDENCE) -> Metric:
    """Mean of a recall over runs on the same images that differ in their seed, where only the runs' own intervals are
    known: that over images as it is, and Student's t of the runs."""
    mean = _mean(runs)
    if len(runs) == 1:
        return mean
    values = np.array([run.value for run in runs])
    error = values.std(ddof=1) / math.sqrt(len(runs))
    return _widened(mean, student_deviations(confidence, len(runs) - 1) * error, "")


def excerpt(found: Sequence[Estimate], objectives: Sequence[Objective]) -> list[Estimate]:
    """All recipes, and at most `SHOWN` searched points, spread over the objectives; in their order."""
    costs, *_ = costs_of([list(one.metrics.values()) for one in found], objectives)
    searched = np.array([one.first.recipe is None for one in found], dtype=bool)
    if searched.sum() <= SHOWN:
        return list(found)
    costs[~searched] = np.nan
    kept = sorted([*spread(costs, SHOWN), *np.flatnonzero(~searched).tolist()])
    return [found[place] for place in kept]


def front_probability(drawn: Floats) -> Floats:
    """In which share of the draws no other point dominates each one.

    Args:
        drawn: costs, smaller is better, (n, m, draws).

    Returns:
        (n,), in [0, 1]; 0 for points with a NaN or an infinite cost.
    """
    axes = np.ascontiguousarray(drawn.transpose(1, 0, 2))  # by axis, point and draw
    least, most = axes.min(axis=2), axes.max(axis=2)
    shares = np.zeros(len(drawn))
    for index in np.flatnonzero(np.isfinite(least + most).all(axis=0)):
        near = np.logical_and.reduce(least <= most[:, [index]])  # may dominate it in some draw
        near[index] = False
        others, point = axes[:, near], axes[:, [index]]
        no_worse = np.logical_and.reduce(others <= point)
        shares[index] = np.mean(~(no_worse & np.logical_or.reduce(others < point)).any(axis=0))
    return shares


def drawn_costs(
    points: Sequence[Sequence[Answered]],
    metrics: Sequence[Mapping[str, Metric]],
    objectives: Sequence[Objective],
    training: TrainingNoise,
    confidence: float,
) -> Floats:
    """Costs on other images and after other trainings, (n, m, draws): the same images for all points.

    Where it is not known which queries a run answered, its errors over images are independent normal ones as wide as
    its interval.

    Args:
        points: runs of each.
        metrics: means of the objectives of each, with intervals over images.
        objectives: of the study.
        training: what other seeds would change.
        confidence: of the intervals.
    """
    names = [objective.metric for objective in objectives]
    errors = mean_errors(points, names, CHANCES)
    unknown = np.isnan(errors[..., 0])
    ends = np.array([[(row[name].value, row[name].low, row[name].high) for name in names] for row in metrics])
    normal = np.random.default_rng(1).standard_normal((unknown.sum(), CHANCES))
    errors[unknown] = normal * ((ends[..., 2] - ends[..., 1])[unknown] / (2 * deviations_in(confidence)))[:, None]
    drawn = np.round(ends[..., :1] + errors, 9)  # equal counts are equal values
    drawn = np.moveaxis(drawn + training.errors([len(runs) for runs in points], CHANCES), 1, 2)
    costs = oriented(drawn.reshape(-1, len(names)), objectives)
    return np.moveaxis(costs.reshape(drawn.shape), 2, 1)


def probabilities(found: Sequence[Estimate], objectives: Sequence[Objective], confidence: float) -> Floats:
    """How probable it is that each one is on the front, (n,); what is far from it is not drawn and has 0."""
    _, best, worst = costs_of([list(estimate.metrics.values()) for estimate in found], objectives)
    near = np.flatnonzero(~beaten(best, worst[front_mask(worst)])).tolist()
    shares = np.zeros(len(found))
    if near:
        points, names = [found[place].runs for place in near], [objective.metric for objective in objectives]
        metrics = [over_images(runs, names, confidence) for runs in points]
        drawn = drawn_costs(points, metrics, objectives, found[0].training, confidence)
        shares[near] = front_probability(drawn)
    return shares


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
        self._repeated = False
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
        self._repeated |= len(runs) > 1  # replicates widen the intervals of all points
        metrics = [_mean(metric) for metric in zip(*(runs[one] for one in order), strict=True)]
        cost, best, worst = costs_of([metrics], self._objectives)
        near = not beaten(best, self._worst.costs)[0]
        self._costs.put(place, cost[0])
        self._worst.put(place, worst[0])
        return known or near or self._repeated


def near_front(
    manifests: Sequence[Manifest], objectives: Sequence[Objective], confidence: float = CONFIDENCE
) -> set[str]:
    """Keys of the complete trials that are on the front or may be, see `NEAR`: what is worth having replicates.

    On other images, that is. What other seeds change is what replicates tell; counted here, it would ask for more and
    more of them.
    """
    names = [objective.metric for objective in objectives]
    found = [
        replace(one, metrics=over_images(one.runs, names, confidence), training=UNKNOWN)
        for one in estimates(manifests, objectives, confidence)
    ]
    costs, *_ = costs_of([list(estimate.metrics.values()) for estimate in found], objectives)
    members = (probabilities(found, objectives, confidence) >= NEAR) | front_mask(costs)
    return {found[index].first.key for index in np.flatnonzero(members)}


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
    costs, *_ = costs_of([list(estimate.metrics.values()) for estimate in found], objectives)
    return _entries(found, costs, probabilities(found, objectives, confidence), front_mask(costs))


def candidates(
    manifests: Sequence[Manifest], objectives: Sequence[Objective], confidence: float = CONFIDENCE
) -> list[FrontEntry]:
    """What is worth being measured again: points that are on the front or may be, see `NEAR`, and all recipes."""
    found = estimates(manifests, objectives, confidence)
    costs, *_ = costs_of([list(estimate.metrics.values()) for estimate in found], objectives)
    shares = probabilities(found, objectives, confidence)
    recipes = np.array([one.first.recipe is not None for one in found], dtype=bool)
    return _entries(found, costs, shares, front_mask(costs) | (shares >= NEAR) | recipes)


def _entries(found: Sequence[Estimate], costs: Floats, shares: Floats, mask: npt.NDArray[np.bool_]) -> list[FrontEntry]:
    members = sorted(np.flatnonzero(mask).tolist(), key=lambda index: (*costs[index], found[index].first.key))
    return [
        FrontEntry(
            key=found[index].first.key,
            params=found[index].first.params,
            values={name: metric.value for name, metric in found[index].metrics.items()},
            intervals={name: (metric.low, metric.high) for name, metric in found[index].metrics.items()},
            recipe=found[index].first.recipe,
            replicates=found[index].replicates,
            probability=float(shares[index]),
            split=found[index].first.split,
        )
        for index in members
    ]


def write_front(path: Location, entries: Sequence[FrontEntry]) -> None:
    """Write the front as JSON, atomically, and only if it differs from what is there."""
    write_if_changed(path, json.dumps([entry.model_dump(mode="json") for entry in entries], indent=1) + "\n")
