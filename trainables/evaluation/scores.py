"""From ranks to what a manifest holds: metrics with intervals, and which queries were answered."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from trainables.config import CLEAN, MATCHING, Protocol
from trainables.data import Split
from trainables.errors import InputError
from trainables.evaluation.eccv import extended_metrics
from trainables.evaluation.expected import Budget, expected_robustness
from trainables.evaluation.intervals import robustness_metrics, share_interval
from trainables.evaluation.measures import gallery_weights, recalls
from trainables.evaluation.retrieval import Ranks, fold_ranks
from trainables.evaluation.robustness import Gallery
from trainables.results import Metric


def recall_metrics(ranks: Mapping[str, Ranks], protocol: Protocol) -> dict[str, Metric]:
    """The metrics of `Protocol.metric_names`: recalls of every target."""
    images = len(ranks[CLEAN].tr)
    weights = gallery_weights(images, protocol.bootstrap_samples, protocol.seed)
    return {
        f"{target}/{name}": share_interval(measure, images, protocol.confidence)
        for target, target_ranks in ranks.items()
        for name, measure in recalls(target_ranks, protocol.recall_at, weights).items()
    }


def all_metrics(ranks: Mapping[str, Ranks], protocol: Protocol) -> dict[str, Metric]:
    """Every measure of every target (see `measures.all_measures`); what is matched is compared with what is matched."""
    by_similarity = {target: found for target, found in ranks.items() if not target.endswith(MATCHING)}
    matched = {target.removesuffix(MATCHING): found for target, found in ranks.items() if target.endswith(MATCHING)}
    found: dict[str, Metric] = {}
    for ending, some in (("", by_similarity), *([(MATCHING, matched)] if matched else [])):
        measured = robustness_metrics(
            some,
            protocol.recall_at,
            samples=protocol.bootstrap_samples,
            confidence=protocol.confidence,
            seed=protocol.seed,
        )
        found |= {name.replace("/", f"{ending}/"): metric for name, metric in measured.items()}
    return found


def expected_metrics(ranks: Mapping[Budget, Ranks], protocol: Protocol) -> dict[str, Metric]:
    """Recalls averaged over a grid of radii and words, by `expected/tr_r1` and so on, see `expected_robustness`."""
    return {
        f"expected/{direction}_r{k}": expected_robustness(
            ranks,
            f"{direction}_r{k}",
            samples=protocol.bootstrap_samples,
            confidence=protocol.confidence,
            seed=protocol.seed,
        ).expected
        for direction in ("tr", "ir", "mr")
        for k in protocol.recall_at
    }


Features = Mapping[str, tuple[Tensor, Tensor]]
"""By target, L2-normalised, of images (images, dim) and captions (captions, dim)."""


def fold_recalls(features: Features, gallery: Gallery, fold_images: int) -> dict[str, float]:
    """Recalls within consecutive blocks of images, by `target/folds_tr_r1`: COCO 1K is blocks of 1,000.

    Raises:
        InputError: the images make no whole number of blocks.
    """
    found = {}
    for target, (images, captions) in features.items():
        try:
            ranks = fold_ranks(images, captions, gallery.caption_image, gallery.caption_groups, fold_images=fold_images)
        except ValueError as error:
            raise InputError(f"fold_images: {error}") from None
        for direction, values in (("tr", ranks.tr), ("ir", ranks.ir)):
            found.update({f"{target}/folds_{direction}_r{k}": float((values <= k).mean()) for k in (1, 5, 10)})
    return found


def extended_recalls(features: Features, test: Split, folder: Path) -> dict[str, float]:
    """Measures by COCO's, CxC's and ECCV Caption's ground truth, by `target/eccv/tr_map_at_r` and so on.

    Raises:
        InputError: the ground truth cannot be read, or knows none of the images.
    """
    found = {}
    for target, (images, captions) in features.items():
        ids = test.image_ids[: len(images)], test.caption_ids[: len(captions)]
        try:
            measured = extended_metrics(images, captions, *ids, folder)
        except (OSError, ValueError) as error:
            raise InputError(f"ground_truth: {error}") from None
        found.update({f"{target}/{name}": value for name, value in measured.items()})
    return found


def correct_bits(ranks: Mapping[str, Ranks], protocol: Protocol) -> dict[str, str]:
    """Which queries were answered, by `target/direction_rk`: bits packed by `np.packbits`, in base64."""
    return {
        f"{target}/{direction}_r{k}": base64.b64encode(np.packbits(values <= k).tobytes()).decode()
        for target, target_ranks in ranks.items()
        for direction, values in (("tr", target_ranks.tr), ("ir", target_ranks.ir))
        for k in protocol.recall_at
    }
