"""Intervals of measures over images, and of the differences between two models on the same gallery."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from trainables.config import CLEAN, DIRECTIONS
from trainables.evaluation.measures import all_measures, gallery_weights, images_answered, recalls
from trainables.evaluation.retrieval import Ranks
from trainables.results import Metric


def interval(measure: np.ndarray, confidence: float) -> Metric:
    """What was measured, and the percentiles of the draws.

    Args:
        measure: (1 + samples,), see `trainables.evaluation.measures`. Draws where it is undefined (NaN) are left out.
        confidence: share of the draws within the interval.
    """
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(measure[1:], [tail, 100 - tail])
    return Metric(value=float(measure[0]), low=float(low), high=float(high))


def share_interval(measure: np.ndarray, images: int, confidence: float) -> Metric:
    """Wilson's interval of a share of queries (Wilson 1927), with the variance of the draws.

    Queries of one image go together, so the share is worth those `n` independent ones that would have the same variance
    (Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts"). At 0
    and 1 no draw varies, and `n` are the images. Percentiles of the draws, of which few are below a share near 0, or
    none, are too narrow there.

    Args:
        measure: (1 + samples,) in [0, 1]. Draws where it is undefined (NaN) are left out.
        images: whose queries are counted.
        confidence: of the interval.
    """
    value, z = float(measure[0]), NormalDist().inv_cdf(0.5 + confidence / 2)
    binomial = value * (1 - value)
    variance = float(np.nanvar(measure[1:])) if binomial > 0 else 0.0
    per_query = variance / binomial if binomial > 0 else 1 / images  # 1 / n
    centre = (value + z * z * per_query / 2) / (1 + z * z * per_query)
    half = z * math.sqrt(variance + (z * per_query / 2) ** 2) / (1 + z * z * per_query)
    return Metric(value=value, low=min(value, max(0.0, centre - half)), high=max(value, min(1.0, centre + half)))


def recall_metrics(
    ranks: Ranks, recall_at: tuple[int, ...], *, samples: int, confidence: float, seed: int
) -> dict[str, Metric]:
    """Recalls with intervals, by `tr_r5`, `ir_r5`, `mr_r5` and so on."""
    images = len(ranks.tr)
    found = recalls(ranks, recall_at, gallery_weights(images, samples, seed))
    return {name: share_interval(measure, images, confidence) for name, measure in found.items()}


def robustness_metrics(
    ranks: Mapping[str, Ranks], recall_at: tuple[int, ...], *, samples: int, confidence: float, seed: int
) -> dict[str, Metric]:
    """Every measure with its interval, by `target/name` as in `all_measures`; what is undefined is left out."""
    images = _images(ranks)
    measures = _defined(all_measures(ranks, recall_at, gallery_weights(images, samples, seed)))
    counted = {f"{direction}_r{k}": images for k in recall_at for direction in DIRECTIONS}
    counted |= {f"{name}_asr_r{k}": n for k in recall_at for name, n in images_answered(ranks[CLEAN], k).items()}
    found = {}
    for name, measure in measures.items():
        counts = counted.get(name.partition("/")[2])
        found[name] = interval(measure, confidence) if counts is None else share_interval(measure, counts, confidence)
    return found


def paired_difference(
    first: Mapping[str, Ranks],
    second: Mapping[str, Ranks],
    recall_at: tuple[int, ...],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Metric]:
    """First minus second in every measure of `all_measures`, both on the same resampled galleries.

    Much narrower than two separate intervals suggest, because images that are hard for one model are hard for the
    other. What is undefined for either is left out.

    Args:
        first: ranks by target of one model; from a manifest, see `stored_ranks`.
        second: of the other, on the same gallery; targets that only one has are left out.
        recall_at: the k of R@k.
        samples: galleries drawn.
        confidence: of the intervals.
        seed: of the draws.

    Raises:
        ValueError: the galleries differ.
    """
    owners = [ranks.caption_image for ranks in (*first.values(), *second.values())]
    if not all(np.array_equal(owner, owners[0]) for owner in owners):
        raise ValueError("the two were measured on different galleries: their captions belong to different images")
    weights = gallery_weights(_images(first), samples, seed)
    one, other = (all_measures(ranks, recall_at, weights) for ranks in (first, second))
    differences = _defined({name: one[name] - other[name] for name in one if name in other})
    return {name: interval(measure, confidence) for name, measure in differences.items()}


def stored_ranks(correct: Mapping[str, str], queries: Mapping[str, int], caption_image: np.ndarray) -> dict[str, Ranks]:
    """Ranks by target from the bits of a manifest. They say at each stored k who was within it, and no more.

    Args:
        correct: bits of the queries answered, by `target/direction_rk`, as `TrialResult.correct` has them.
        queries: their number by direction, as in `TrialResult.queries`.
        caption_image: (captions,) index of each caption's image, of the gallery they were measured on.

    Raises:
        ValueError: the gallery is not the one that was measured.
    """
    sizes = {"tr": int(caption_image.max()) + 1, "ir": len(caption_image)}
    if dict(queries) != sizes:
        raise ValueError(f"measured on {dict(queries)} queries, the gallery has {sizes}")
    found: dict[str, dict[str, np.ndarray]] = {}
    from_largest_k = sorted(correct.items(), key=lambda item: -int(item[0].rpartition("_r")[2]))
    for name, text in from_largest_k:  # the largest k first, so that smaller ones overwrite it
        target, _, metric = name.rpartition("/")
        direction, _, k = metric.rpartition("_r")
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=sizes[direction]).astype(bool)
        ranks = found.setdefault(target, {d: np.full(size, np.iinfo(np.int64).max) for d, size in sizes.items()})
        ranks[direction][bits] = int(k)
    return {target: Ranks(ranks["tr"], ranks["ir"], caption_image) for target, ranks in found.items()}


def _images(ranks: Mapping[str, Ranks]) -> int:
    return len(next(iter(ranks.values())).tr)


def _defined(measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: measure for name, measure in measures.items() if not np.isnan(measure[0])}
