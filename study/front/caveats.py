"""What has to be known before a study's front is relied on: where it says nothing, or less than it seems to."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from study.config import COSTS, Objective
from study.front.dominance import BLOCK, Floats, measured
from study.front.estimates import Estimate, FrontEntry, estimates
from study.records import Manifest
from trainables.caveats import at_chance, idle_attacks, in_words, small_gallery
from trainables.config import CLEAN, DIRECTIONS, Protocol
from trainables.errors import counted
from trainables.results import Caveat, Metric

DRAWS = 1000
"""Galleries that a paired interval is made of."""

NAMED = 3
"""Trials that a sentence names, before it only counts them."""


def study_caveats(
    manifests: Sequence[Manifest],
    entries: Sequence[FrontEntry],
    objectives: Sequence[Objective],
    protocol: Protocol,
) -> list[Caveat]:
    """In the order of their weight.

    Args:
        manifests: the ended trials.
        entries: the front of them.
        objectives: of the study.
        protocol: they were measured under.
    """
    complete = [manifest for manifest in manifests if manifest.state == "complete"]
    if not complete:
        return []
    found = _chance(complete, entries, protocol.confidence) + _untouched(complete)
    alike = _alike(complete, objectives)
    void = any(caveat.void for caveat in (*found, *alike))
    found += alike + idle_attacks(complete, protocol) + small_gallery(complete[0].queries.get("tr", 0), protocol)
    if len(objectives) > 1 and len(complete) > 2 and len(entries) == 1 and not void:
        found.append(Caveat(text=f"{entries[0].key} is best in every objective: no trade-off between them was found"))
    return found if void else found + _like_a_recipe(manifests, entries, objectives, protocol.confidence)


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def _chance(complete: Sequence[Manifest], entries: Sequence[FrontEntry], confidence: float) -> list[Caveat]:
    told = {one.key: words for one in complete if (words := at_chance(one, confidence, looks=len(complete)))}
    if len(told) == len(complete):
        best = max(complete, key=lambda one: max(m.value for n, m in one.metrics.items() if n.startswith(f"{CLEAN}/")))
        found = counted(len(complete), "complete trial")
        text = f"not one of {found} retrieves better than chance before any attack, so nothing "
        text += f"can be concluded: in the best, {told[best.key]}; start from a pretrained model (trial.model.base, or "
        return [Caveat(text=text + "the preset real_small), or train longer", void=True)]
    on_front = [entry.key for entry in entries if entry.key in told]
    if not on_front:
        return []
    text = f"on the front, but no better than chance before any attack: {_named(on_front)} ({told[on_front[0]]})"
    return [Caveat(text=text)]


def _untouched(complete: Sequence[Manifest]) -> list[Caveat]:
    idle = [manifest for manifest in complete if manifest.untouched]
    if not idle:
        return []
    text = f"{_named([one.key for one in idle])}: the untouched base model, as training had no effect "
    return [Caveat(text=text + f"({idle[0].untouched})", void=len(idle) == len(complete) > 1)]


def _alike(complete: Sequence[Manifest], objectives: Sequence[Objective]) -> list[Caveat]:
    """Objectives in which all trials are equal."""
    if len(complete) < 2:
        return []
    values = {o.metric: {measured(one, o.metric).value for one in complete} for o in objectives}
    constant = {name: next(iter(found)) for name, found in values.items() if len(found) == 1}
    if len(constant) == len(objectives):
        text = f"all {len(complete)} complete trials are equal in every objective, so nothing can be concluded: "
        return [Caveat(text=text + ", ".join(f"{name} {value:.3f}" for name, value in constant.items()), void=True)]
    found = []
    for name, value in constant.items():
        text = f"{name} is {value:.3f} in all {len(complete)} complete trials and tells nothing of them"
        if value == 0 and not name.startswith((f"{CLEAN}/", "cost/")):
            text += "; the attack is too strong for any of them: try a smaller protocol.epsilon, or a larger k"
        found.append(Caveat(text=text))
    return found


def _like_a_recipe(
    manifests: Sequence[Manifest], entries: Sequence[FrontEntry], objectives: Sequence[Objective], confidence: float
) -> list[Caveat]:
    """Searched trials on the front that differ from some recipe in no recall."""
    of = {estimate.first.key: estimate for estimate in estimates(manifests, objectives, confidence)}
    recipes = [estimate for estimate in of.values() if estimate.first.recipe is not None]
    recalls = [objective.metric for objective in objectives if objective.metric not in COSTS]
    searched = [of[entry.key] for entry in entries if entry.recipe is None]
    if not recipes or not recalls or not searched:
        return []
    told = []
    for start in range(0, len(searched), BLOCK):
        members = searched[start : start + BLOCK]
        found = np.stack([_differences(members, recipes, name, confidence) for name in recalls], axis=2)
        like: npt.NDArray[np.bool_] = ~np.any((found[..., 1] > 0) | (found[..., 2] < 0), axis=2)
        for place in np.flatnonzero(np.any(like, axis=1)):
            alike = []
            for other in np.flatnonzero(like[place]):
                differences = map(_metric, found[place, other])
                name, most = max(zip(recalls, differences, strict=True), key=lambda item: abs(item[1].value))
                words = f"{members[place].first.key} from {recipes[other].first.recipe}"
                alike.append((abs(most.value), f"{words} ({name} by {in_words(most)} at most)"))
            told.append(min(alike)[1])  # the nearest recipe
    if not told:
        return []
    text = f"{len(told)} of {len(searched)} searched trials on the front cannot be told from a recipe"
    if images := searched[0].first.queries.get("tr"):
        text += f" on these {images} images"
    return [Caveat(text=f"{text}: {_named(told)}; more evaluation images or replicates may tell them apart")]


def paired_difference(one: Estimate, other: Estimate, metric: str, confidence: float) -> Metric:
    """One minus the other in a recall, with its interval.

    Both are resampled on the same images, a percentile bootstrap that is much narrower than two intervals beside each
    other: images that are hard for one model are hard for the other. Where the bits of the queries are not known for
    the same gallery, the errors count as independent.
    """
    return _metric(_differences([one], [other], metric, confidence)[0, 0])


def _metric(ends: Floats) -> Metric:
    value, low, high = ends.tolist()
    return Metric(value=value, low=low, high=high)


def _differences(ones: Sequence[Estimate], others: Sequence[Estimate], metric: str, confidence: float) -> Floats:
    """`paired_difference` of each one and each other: (ones, others, 3), the value and the ends of its interval."""
    first, second = (np.array([_ends(one.metrics[metric]) for one in side]) for side in (ones, others))
    values = first[:, None, 0] - second[:, 0]
    half = np.hypot(first[:, None, 1], second[:, 1])
    found: Floats = np.stack([values, values - half, values + half], axis=2)
    galleries, other_galleries = _galleries(ones, metric), _galleries(others, metric)
    for asked in galleries.keys() & other_galleries.keys():
        (rows, hits, totals), (columns, other_hits, _) = galleries[asked], other_galleries[asked]
        draws = ((hits[:, None] - other_hits) / totals).mean(axis=2)
        ends = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=2, overwrite_input=True)
        found[np.ix_(rows, columns, [1, 2])] = np.moveaxis(ends, 0, 2)
    return found


def _ends(metric: Metric) -> tuple[float, float]:
    """A value, and half the width of its interval."""
    return metric.value, (metric.high - metric.low) / 2


def _galleries(side: Sequence[Estimate], metric: str) -> dict[bytes, tuple[list[int], Floats, Floats]]:
    """By the queries of a gallery: places of the estimates that were measured on it, what each answers of its
    resampled images, (estimates, directions, `DRAWS`), and what is asked there, (directions, `DRAWS`)."""
    measured_on: dict[bytes, list[tuple[int, Floats, Floats]]] = {}
    for place, estimate in enumerate(side):
        if (known := _by_image(estimate, metric)) is not None:
            measured_on.setdefault(known[1].tobytes(), []).append((place, *known))
    found = {}
    for key, group in measured_on.items():
        places, answered, asked = zip(*group, strict=True)
        weights = _resampled(asked[0].shape[1]).T
        found[key] = list(places), np.tensordot(np.array(answered), weights, 1), asked[0] @ weights
    return found


def _by_image(estimate: Estimate, metric: str) -> tuple[Floats, Floats] | None:
    """Queries answered and asked, (directions, images), means over the replicates; None where they are not known."""
    target, _, recall = metric.partition("/")
    direction, _, k = recall.partition("_")
    directions = DIRECTIONS[:2] if direction == "mr" else (direction,)
    answered, asked = [], []
    for run in estimate.runs:
        images, captions = run.queries.get("tr", 0), run.queries.get("ir", 0)
        names = [f"{target}/{each}_{k}" for each in directions]
        counts = run.captions_per_image or [captions // images] * images if images else []
        if not counts or sum(counts) != captions or not all(name in run.correct for name in names):
            return None
        owners = {"tr": np.arange(images), "ir": np.repeat(np.arange(images), counts)}
        bits = (np.frombuffer(base64.b64decode(run.correct[name]), np.uint8) for name in names)
        answered.append(
            [
                np.bincount(owners[each], np.unpackbits(packed, count=len(owners[each])), images)
                for each, packed in zip(directions, bits, strict=True)
            ]
        )
        asked.append([np.bincount(owners[each], minlength=images) for each in directions])
    if any(np.shape(one) != np.shape(asked[0]) for one in asked):
        return None
    return np.mean(answered, axis=0), np.mean(asked, axis=0)


@lru_cache(maxsize=1)
def _resampled(images: int) -> Floats:
    """How often each image is drawn, (`DRAWS`, images)."""
    return np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), DRAWS).astype(float)
