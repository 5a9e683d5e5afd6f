"""What is measured of a model, on the gallery and on resampled ones.

A measure is an array (1 + samples,): first as measured, then on each resampled gallery. Measures of any models and
conditions under the same weights are paired: subtract the arrays, and the interval is that of the difference.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainables.config import CLEAN, DIRECTIONS
from trainables.evaluation.retrieval import Ranks


def gallery_weights(images: int, samples: int, seed: int) -> np.ndarray:
    """How often each image counts, (1 + samples, images): once each, then as drawn with replacement.

    Whole images are drawn, each with all its captions, because the captions of one image are not independent (cluster
    bootstrap, Davison and Hinkley 1997, section 3.8).
    """
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=samples)
    return np.vstack([np.ones(images), draws])


def recalls(ranks: Ranks, recall_at: tuple[int, ...], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Shares of queries answered within the first k, in [0, 1], by `tr_r5`, `ir_r5`, `mr_r5` (their mean) and so on."""
    everyone = np.ones_like(ranks.tr), np.ones_like(ranks.ir)
    found = {}
    for k in recall_at:
        answered = ranks.tr <= k, ranks.ir <= k
        found.update({f"{name}_r{k}": share for name, share in _shares(answered, everyone, ranks, weights).items()})
    return found


def rsum(recall: Mapping[str, np.ndarray]) -> np.ndarray:
    """Sum of text and image recalls; of R@1, R@5 and R@10 in [0, 6]. Papers give it times 100."""
    return np.sum([share for name, share in recall.items() if not name.startswith("mr_")], axis=0)


def attack_success(
    clean: Ranks, attacked: Ranks, recall_at: tuple[int, ...], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Share of the queries answered when clean that are lost, as in SGA (Lu et al. 2023), by `tr_asr_r1` and so on.

    attacked recall >= clean recall * (1 - share lost), and equal where the attack made no query right. NaN where no
    query was answered when clean.
    """
    found = {}
    for k in recall_at:
        answered = clean.tr <= k, clean.ir <= k
        lost = answered[0] & (attacked.tr > k), answered[1] & (attacked.ir > k)
        found.update({f"{name}_asr_r{k}": share for name, share in _shares(lost, answered, clean, weights).items()})
    return found


def images_answered(ranks: Ranks, k: int) -> dict[str, int]:
    """Images with a query answered within the first k, by direction; for the mean of both those of the fewer."""
    tr, ir = int((ranks.tr <= k).sum()), len(np.unique(ranks.caption_image[ranks.ir <= k]))
    return dict(zip(DIRECTIONS, (tr, ir, min(tr, ir)), strict=True))


def all_measures(ranks: Mapping[str, Ranks], recall_at: tuple[int, ...], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every measure of every target, by `target/name`.

    For each target its recalls and `rsum`. For each attack also both success rates in use, which are different things:
    `tr_asr_r1` (see `attack_success`) and `tr_drop_r1`, clean minus attacked recall (Co-Attack, Zhang et al. 2022); and
    `mmi`, the share of RSUM that is lost (Qiu et al. 2022).

    Args:
        ranks: by target, `clean` and those of the attacks, on one gallery.
        recall_at: the k of R@k.
        weights: see `gallery_weights`.
    """
    found = {}
    clean = recalls(ranks[CLEAN], recall_at, weights)
    for target, target_ranks in ranks.items():
        recall = clean if target == CLEAN else recalls(target_ranks, recall_at, weights)
        own = {**recall, "rsum": rsum(recall)}
        if target != CLEAN:
            own |= {name.replace("_r", "_drop_r"): clean[name] - share for name, share in recall.items()}
            own |= attack_success(ranks[CLEAN], target_ranks, recall_at, weights)
            with np.errstate(invalid="ignore"):
                own["mmi"] = (rsum(clean) - own["rsum"]) / rsum(clean)
        found.update({f"{target}/{name}": measure for name, measure in own.items()})
    return found


def _shares(
    part: tuple[np.ndarray, np.ndarray], whole: tuple[np.ndarray, np.ndarray], ranks: Ranks, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Share of the queries of `whole`, (images,) and (captions,), that are in `part`, by direction."""
    images = weights.shape[1]
    per_image = np.stack(
        [
            *(part[0], whole[0]),
            *(np.bincount(ranks.caption_image, weights=queries, minlength=images) for queries in (part[1], whole[1])),
        ],
        axis=1,
    )
    tr_part, tr_whole, ir_part, ir_whole = (weights @ per_image).T
    with np.errstate(invalid="ignore"):
        tr, ir = tr_part / tr_whole, ir_part / ir_whole
    return dict(zip(DIRECTIONS, (tr, ir, (tr + ir) / 2), strict=True))
