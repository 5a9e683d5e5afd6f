"""Percentile bootstrap intervals of measures, and of the differences between two models on the same gallery."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import numpy as np

from trainables.evaluation.measures import all_measures, gallery_weights, recalls
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


def recall_metrics(
    ranks: Ranks, recall_at: tuple[int, ...], *, samples: int, confidence: float, seed: int
) -> dict[str, Metric]:
    """Recalls with intervals, by `tr_r5`, `ir_r5`, `mr_r5` and so on."""
    weights = gallery_weights(len(ranks.tr), samples, seed)
    return {name: interval(measure, confidence) for name, measure in recalls(ranks, recall_at, weights).items()}


def robustness_metrics(
    ranks: Mapping[str, Ranks], recall_at: tuple[int, ...], *, samples: int, confidence: float, seed: int
) -> dict[str, Metric]:
    """Every measure with its interval, by `target/name` as in `all_measures`; what is undefined is left out."""
    weights = gallery_weights(_images(ranks), samples, seed)
    return _intervals(all_measures(ranks, recall_at, weights), confidence)


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
    return _intervals({name: one[name] - other[name] for name in one if name in other}, confidence)


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


def _intervals(measures: Mapping[str, np.ndarray], confidence: float) -> dict[str, Metric]:
    return {name: interval(measure, confidence) for name, measure in measures.items() if not np.isnan(measure[0])}
