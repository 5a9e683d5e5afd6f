"""Bootstrap intervals over evaluation images."""

from __future__ import annotations

import numpy as np

from trainables.config import DIRECTIONS, Metric
from trainables.evaluation.retrieval import Ranks


def recall_metrics(
    ranks: Ranks, recall_at: tuple[int, ...], *, samples: int, confidence: float, seed: int
) -> dict[str, Metric]:
    """Recall with percentile intervals, by `tr_r5`, `ir_r5`, `mr_r5` and so on.

    Whole images are drawn with replacement, each with all its captions, because the captions of one image are not
    independent (cluster bootstrap, Davison and Hinkley 1997, section 3.8). The draws are the same for every metric and
    every model on the same gallery, so differences can be paired.
    """
    images = len(ranks.tr)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=samples)
    captions = np.bincount(ranks.caption_image, minlength=images)
    tail = 100 * (1 - confidence) / 2
    metrics = {}
    for k in recall_at:
        tr_hits = (ranks.tr <= k).astype(float)
        ir_hits = np.bincount(ranks.caption_image, weights=ranks.ir <= k, minlength=images)
        tr = tr_hits.mean(), draws @ tr_hits / images
        ir = ir_hits.sum() / captions.sum(), (draws @ ir_hits) / (draws @ captions)
        mr = (tr[0] + ir[0]) / 2, (tr[1] + ir[1]) / 2
        for direction, (value, drawn) in zip(DIRECTIONS, (tr, ir, mr), strict=True):
            low, high = np.percentile(drawn, [tail, 100 - tail])
            metrics[f"{direction}_r{k}"] = Metric(value=float(value), low=float(low), high=float(high))
    return metrics
