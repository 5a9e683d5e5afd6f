"""What values of trials err by: over images, which all trials of a study share, and over seeds of training.

Images are drawn anew, with replacement and with all their captions, once for all trials (cluster bootstrap, Davison and
Hinkley 1997, section 3.8): those that are hard for one model are hard for the other, so a difference, and who is on the
front, is known much better than intervals beside each other say. The draws are those of the number of images, so that a
page, a certificate and a comparison of studies agree.

Replicates of a point differ by their seed of training, and by what of it depends on the image. As in a two-way layout
with random effects and one value a cell (Cornfield and Tukey 1956, "Average values of mean squares in factorials"), the
variance of the mean of r runs is that over images of their mean, which has the second already, and that of seeds over
r. The latter is pooled over all points that have replicates: a point has too few runs to tell its own.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Protocol as Interface

import numpy as np
import numpy.typing as npt

from study.config import COSTS
from study.front.dominance import BLOCK, Floats
from trainables.caveats import Measured
from trainables.config import DIRECTIONS

DRAWS = 1000
"""Galleries drawn."""


class Answered(Measured, Interface):
    """A run with the bits of its queries."""

    @property
    def captions_per_image(self) -> Sequence[int]:
        """Empty in files of earlier versions, where all images have equally many."""


@lru_cache(maxsize=4)
def resampled(images: int) -> npt.NDArray[np.float32]:
    """How often each image is drawn, (images, `DRAWS`). Draws of different numbers of images are independent."""
    drawn = np.random.default_rng([images]).multinomial(images, np.full(images, 1 / images), DRAWS)
    return np.ascontiguousarray(drawn.T, dtype=np.float32)


def image_errors(runs: Sequence[Answered], metrics: Sequence[str], draws: int = DRAWS) -> Floats:
    """How far each value is off on every drawn gallery: (runs, metrics, draws).

    NaN where it is not known which queries were answered; 0 for costs, which do not depend on images.
    """
    found = np.full((len(runs), len(metrics), draws), np.nan)
    galleries: list[tuple[list[int], list[int]]] = []
    for place, run in enumerate(runs):
        if counts := _captions_per_image(run):
            places = next((places for known, places in galleries if known == counts), None)
            if places is None:
                galleries.append((counts, places := []))
            places.append(place)
    for column, metric in enumerate(metrics):
        if metric in COSTS:
            found[:, column] = 0.0
            continue
        for counts, places in galleries:
            for start in range(0, len(places), BLOCK):
                block = places[start : start + BLOCK]
                found[block, column] = _errors([runs[place] for place in block], metric, np.array(counts), draws)
    return found


def mean_errors(points: Sequence[Sequence[Answered]], metrics: Sequence[str], draws: int = DRAWS) -> Floats:
    """`image_errors` of the means over each point's runs: (points, metrics, draws)."""
    errors = image_errors([run for runs in points for run in runs], metrics, draws)
    counts = np.array([len(runs) for runs in points])
    if len(errors) == len(points):
        return errors
    means: Floats = np.add.reduceat(errors, np.cumsum(counts) - counts, axis=0) / counts[:, None, None]
    return means


def is_known(runs: Sequence[Answered], metrics: Sequence[str]) -> bool:
    """Whether every query that was answered is on record."""
    bits = [bits for metric in metrics if metric not in COSTS for bits in _bits(metric).values()]
    return all(_captions_per_image(run) and all(name in run.correct for name in bits) for run in runs)


def student_deviations(confidence: float, freedom: int) -> float:
    """Half the width of an interval of Student's t, in standard errors."""
    from scipy.special import stdtrit  # takes so long to load that help would not come at once

    return float(stdtrit(freedom, 0.5 + confidence / 2))


def _bits(metric: str) -> dict[str, str]:
    """Names of the bits of each direction that a recall counts."""
    target, _, recall = metric.partition("/")
    direction, _, k = recall.partition("_")
    return {each: f"{target}/{each}_{k}" for each in (DIRECTIONS[:2] if direction == "mr" else (direction,))}


def _captions_per_image(run: Answered) -> list[int]:
    images, captions = run.queries.get("tr", 0), run.queries.get("ir", 0)
    counts = list(run.captions_per_image) or ([captions // images] * images if images else [])
    return counts if sum(counts) == captions else []


def _errors(runs: Sequence[Answered], metric: str, counts: npt.NDArray[np.int64], draws: int) -> Floats:
    """Of runs on one gallery, (runs, draws)."""
    weights, last, names = resampled(len(counts))[:, :draws], np.cumsum(counts), _bits(metric)
    errors = np.zeros((len(runs), draws))
    for each, name in names.items():
        asked = np.ones(len(counts), np.float32) if each == "tr" else counts.astype(np.float32)
        answered = np.full((len(runs), len(counts)), np.nan, np.float32)
        for row, run in zip(answered, runs, strict=True):
            if packed := run.correct.get(name):
                bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=int(asked.sum()))
                row[:] = bits if each == "tr" else np.diff(np.cumsum(bits, dtype=np.int64)[last - 1], prepend=0)
        drawn, of = (np.float64(part @ weights) for part in (answered, asked))  # whole numbers, exact in float32
        errors += (drawn / of - answered.sum(1, keepdims=True, dtype=np.float64) / asked.sum()) / len(names)
    return errors


@dataclass(frozen=True)
class TrainingNoise:
    """What the seed of training changes in the objectives.

    Attributes:
        metrics: names of the objectives.
        covariance: of one run's values, (metrics, metrics), without what depends on the image.
        freedom: degrees of freedom that it is known with; 0 without replicates: then it is not known, and values are
            those of the runs that there are.
    """

    metrics: tuple[str, ...]
    covariance: Floats
    freedom: int

    @property
    def sources(self) -> str:
        """Of errors, in words."""
        return "images and training seeds" if self.freedom else "images"

    def half(self, metric: str, runs: float, confidence: float) -> float:
        """Half the width of the interval of a mean of so many runs."""
        if not self.freedom:
            return 0.0
        place = self.metrics.index(metric)
        return student_deviations(confidence, self.freedom) * math.sqrt(self.covariance[place, place] / runs)

    def errors(self, runs: Sequence[int], draws: int = DRAWS) -> Floats:
        """Of means of so many runs, (points, metrics, draws), or 0: Student's t, with one variance for all points."""
        if not self.freedom:
            return np.zeros((len(runs), 1, 1))
        rng, shape = np.random.default_rng(0), (len(runs), len(self.metrics), draws)
        values, vectors = np.linalg.eigh(self.covariance)
        errors = np.einsum("mn,pnd->pmd", vectors * np.sqrt(np.maximum(values, 0)), rng.standard_normal(shape))
        scale = np.sqrt(self.freedom / rng.chisquare(self.freedom, draws))
        found: Floats = errors * scale / np.sqrt(np.array(runs))[:, None, None]
        return found


UNKNOWN = TrainingNoise((), np.zeros((0, 0)), 0)
"""Values are taken for those of the runs that there are."""


def training_noise(
    points: Sequence[Sequence[Answered]], values: Sequence[Floats], metrics: Sequence[str]
) -> TrainingNoise:
    """Pooled over the points that have replicates.

    Args:
        points: their runs.
        values: of the same, (runs, metrics) each.
        metrics: names of the objectives.
    """
    size = len(metrics)
    scatter, of_images, freedom = np.zeros((size, size)), np.zeros((size, size)), 0
    for runs, measured in zip(points, values, strict=True):
        if len(runs) < 2 or not np.isfinite(measured).all():
            continue
        off = measured - measured.mean(0)
        scatter += off.T @ off
        freedom += len(runs) - 1
        if is_known(runs, metrics):
            errors = image_errors(runs, metrics)
            errors -= errors.mean(0)  # what is left is how differently the runs do on the same images
            of_images += np.einsum("rmd,rnd->mn", errors, errors) / DRAWS
    if not freedom:
        return UNKNOWN
    scale = np.sqrt(np.where(np.diag(scatter) > 0, np.diag(scatter), 1.0))
    unit = (scatter - of_images) / np.outer(scale, scale)
    eigenvalues, vectors = np.linalg.eigh(unit)
    unit = (vectors * np.maximum(eigenvalues, 0)) @ vectors.T
    return TrainingNoise(tuple(metrics), unit * np.outer(scale, scale) / freedom, freedom)


def differences(
    ones: tuple[Floats, Floats], others: tuple[Floats, Floats], seeds: Floats, images: int, confidence: float
) -> Floats:
    """Ones minus others in a metric: (ones, others, 3), the value and the ends of its interval.

    Where no drawn gallery tells two apart, their images differ in at most the share that Wilson's interval has for none
    of so many.

    Args:
        ones: values and half widths of their intervals, (n, 2), and errors over images, (n, `DRAWS`). Where these are
            NaN the half widths are taken for independent.
        others: the same.
        seeds: half widths by the seeds of training, (ones, others).
        images: that were drawn.
        confidence: of the intervals.
    """
    (first, errors), (second, other_errors) = ones, others
    values = first[:, None, 0] - second[:, 0]
    apart = np.hypot(first[:, None, 1], second[:, 1])
    ends = np.stack([-apart, apart])
    drawn = errors[:, None] - other_errors
    known = np.isfinite(drawn[..., 0])
    if known.any():
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        ends[:, known] = np.quantile(drawn[known], tails, axis=1, overwrite_input=True)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    alike = known & (ends[0] == ends[1])
    ends[:, alike] = np.array([[-1.0], [1.0]]) * z * z / (images + z * z) if images else 0.0
    low, high = values - np.hypot(ends[0], seeds), values + np.hypot(ends[1], seeds)
    found: Floats = np.stack([values, low, high], axis=2)
    return found
