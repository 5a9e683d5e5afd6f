"""What has to be known before measured numbers are relied on, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Protocol as Interface

from trainables.config import CLEAN, Protocol, TrialConfig
from trainables.results import Caveat, Metric


class Measured(Interface):
    """What a manifest says of one model's evaluation."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """By name."""

    @property
    def correct(self) -> Mapping[str, str]:
        """Bits of the queries answered, by `target/direction_rk`."""

    @property
    def queries(self) -> Mapping[str, int]:
        """Their number by direction; `tr` is that of the images, `ir` that of the captions."""


def chance(k: int, images: int, captions: int) -> float:
    """Recall at k of a model that ranks at random, mean of both directions.

    An image finds one of its own c captions among the first k of N unless all k are others', which has the
    hypergeometric probability `prod (N - c - i) / (N - i), i < k`. A caption finds its one image with `k / images`.

    Example:
        >>> chance(1, images=10, captions=50)
        0.1
    """
    own = captions / images
    missed = math.prod(max(0.0, (captions - own - i) / (captions - i)) for i in range(min(k, captions)))
    return round((1 - missed + min(1.0, k / images)) / 2, 12)


def at_chance(measured: Measured, confidence: float, looks: int = 1) -> str | None:
    """What was measured, in words, if not one clean recall is above chance; None if one is, or if none can be judged.

    Args:
        measured: with an interval for each recall.
        confidence: of the intervals.
        looks: how many models the same is asked of. The more there are, the further the luckiest of those at chance is
            above it, so the share of the draws beyond an end of the interval is divided by the looks (Bonferroni).
    """
    images, captions = measured.queries.get("tr", 0), measured.queries.get("ir", 0)
    recalls = {
        int(name.rpartition("_r")[2]): metric
        for name, metric in measured.metrics.items()
        if name.startswith(f"{CLEAN}/mr_r") and int(name.rpartition("_r")[2]) < images
    }
    if not recalls:
        return None
    beyond = (1 - confidence) / 2
    needed = NormalDist().inv_cdf(1 - beyond / (looks * len(recalls))) / (2 * NormalDist().inv_cdf(1 - beyond))
    if any(m.value - needed * (m.high - m.low) > chance(k, images, captions) for k, m in recalls.items()):
        return None
    k = max(recalls)
    told = f"{CLEAN}/mr_r{k} is {in_words(recalls[k])}, chance {chance(k, images, captions):.3f}"
    return f"{told} ({images} images, {captions} captions)"


def in_words(metric: Metric) -> str:
    """`0.052 [0.031, 0.078]`."""
    return f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"


def small_gallery(images: int, protocol: Protocol) -> list[Caveat]:
    """Whether fewer images were, or will be, evaluated than the protocol asks for."""
    if not 0 < images < protocol.gallery_images:
        return []
    text = (
        f"the gallery has {images} images, protocol.gallery_images asks for {protocol.gallery_images}: intervals are "
    )
    text += (
        "wider, and recall at k is easier; of the evaluation split, images with data.eval_min_captions captions count"
    )
    return [Caveat(text=text)]


def idle_attacks(measured: Sequence[Measured], protocol: Protocol) -> list[Caveat]:
    """Attacks of the protocol after which every model answers every query as before."""
    clean = [_answers(one, CLEAN) for one in measured]
    idle = [attack.name for attack in protocol.attacks if clean == [_answers(one, attack.name) for one in measured]]
    if not idle or not any(clean):
        return []
    text = f"{', '.join(idle)}: every query is answered as without an attack, which says nothing of robustness; the "
    return [Caveat(text=text + f"budget is epsilon {255 * protocol.epsilon:.3g}/255 and {protocol.words} words")]


def evaluation_caveats(measured: Measured, protocol: Protocol) -> list[Caveat]:
    """Of one model, measured under the protocol."""
    words = at_chance(measured, protocol.confidence)
    found = [Caveat(text=f"no better than chance before any attack: {words}", void=True)] if words else []
    return [*found, *idle_attacks([measured], protocol), *small_gallery(measured.queries.get("tr", 0), protocol)]


def _answers(measured: Measured, target: str) -> dict[str, object]:
    """Which queries a target answered, or how many where only that is known."""
    found: dict[str, object] = dict(measured.correct) or {name: m.value for name, m in measured.metrics.items()}
    recalls = {name.removeprefix(f"{target}/"): value for name, value in found.items() if name.startswith(f"{target}/")}
    return {name: value for name, value in recalls.items() if name[3:4] == "r" and name[4:].isdigit()}


def foreseen(trial: TrialConfig, train_images: int, test_images: int) -> list[Caveat]:
    """What can be said before anything is trained.

    Args:
        trial: the configuration.
        train_images: there are.
        test_images: that can be evaluated on.
    """
    model, found = trial.model, small_gallery(test_images, trial.protocol)
    if trial.data.root is not None and model.base is None and model.image_tower is None:
        on = f"{train_images} images" if model.pretrain.root is None else f"the images of {model.pretrain.root}"
        text = (
            f"no pretrained model is named: a tiny {(model.family or 'clip').upper()} is trained from scratch on {on}, "
        )
        text += (
            "which for photographs ends near chance; give model.base, or an image_tower as the preset real_small does"
        )
        found.append(Caveat(text=text))
    return found
