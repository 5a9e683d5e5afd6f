"""What has to be known before a study's front is relied on: where it says nothing, or less than it seems to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from study.config import COSTS, Objective
from study.front.dominance import BLOCK, Floats, measured
from study.front.estimates import Estimate, FrontEntry, estimates, over_images
from study.front.paired import differences, mean_errors
from study.records import Manifest
from trainables.caveats import at_chance, idle_attacks, in_words, small_gallery
from trainables.config import CLEAN, TEST, Protocol
from trainables.errors import counted
from trainables.results import Caveat, Metric

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
    found = _chance(complete, entries, protocol.confidence) + _untouched(complete) + _seen(complete)
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


def _seen(complete: Sequence[Manifest]) -> list[Caveat]:
    """The search chose by images that certification measures."""
    if all(one.split != TEST for one in complete):
        return []
    text = "searched on the test split (data.eval_split): what is chosen by these images looks better on them than it "
    return [Caveat(text=text + "is, and no image is left to certify it on that the search has not seen")]


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
    """One minus the other in a recall, with its interval, see `study.front.paired`: that over images is much narrower
    than two intervals beside each other. Where it is not known which queries were answered, errors over images count
    as independent."""
    if one is other:
        return Metric(value=0, low=0, high=0)
    return _metric(_differences([one], [other], metric, confidence)[0, 0])


def _metric(ends: Floats) -> Metric:
    value, low, high = ends.tolist()
    return Metric(value=value, low=low, high=high)


def _differences(ones: Sequence[Estimate], others: Sequence[Estimate], metric: str, confidence: float) -> Floats:
    """`paired_difference` of each one and each other: (ones, others, 3), the value and the ends of its interval."""
    replicates, other_replicates = (np.array([one.replicates for one in side]) for side in (ones, others))
    seeds = ones[0].training.half(metric, 1, confidence) * np.sqrt(1 / replicates[:, None] + 1 / other_replicates)
    images = ones[0].first.queries.get("tr", 0)
    return differences(_side(ones, metric, confidence), _side(others, metric, confidence), seeds, images, confidence)


def _side(points: Sequence[Estimate], metric: str, confidence: float) -> tuple[Floats, Floats]:
    found = [over_images(one.runs, [metric], confidence)[metric] for one in points]
    errors = mean_errors([one.runs for one in points], [metric])[:, 0]
    return np.array([(one.value, (one.high - one.low) / 2) for one in found]), errors
