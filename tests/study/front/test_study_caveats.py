"""What a front does not say by itself: hand-worked studies of two images and more."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

import numpy as np
import pytest

from study.config import Objective
from study.front.caveats import _differences, paired_difference, study_caveats
from study.front.estimates import Estimate, estimates, front
from study.front.paired import resampled
from study.records import Manifest
from trainables.config import Protocol
from trainables.results import Caveat, Metric

OBJECTIVES = (Objective(metric="clean/mr_r1"), Objective(metric="both/mr_r1"))
IMAGES, OWN = 100, 5
PROTOCOL = Protocol.model_validate({"attacks": ["both"], "gallery_images": IMAGES})


def answered(share: float, seed: int = 0) -> np.ndarray:
    """(images,) the first queries of an order that the seed decides."""
    order = np.random.default_rng(seed).permutation(IMAGES)
    return np.isin(np.arange(IMAGES), order[: round(share * IMAGES)])


def trial(number: int, clean: np.ndarray, both: np.ndarray, **fields: Any) -> Manifest:
    """A trial that answers these images, and all captions of them."""
    metrics, correct = {}, {}
    for target, hits in (("clean", clean), ("both", both)):
        value, half = hits.mean(), 1.96 * hits.std() / np.sqrt(IMAGES)
        metrics[f"{target}/mr_r1"] = Metric(value=value, low=value - half, high=value + half)
        for direction, bits in (("tr", hits), ("ir", np.repeat(hits, OWN))):
            correct[f"{target}/{direction}_r1"] = b64encode(np.packbits(bits).tobytes()).decode()
    given: dict[str, Any] = {
        "key": f"s-t{number:05d}-s0",
        "number": number,
        "recipe": None,
        "params": {},
        "point": {},
        "state": "complete",
        "metrics": metrics,
        "split": "val",
        "correct": correct,
        "queries": {"tr": IMAGES, "ir": IMAGES * OWN},
        "captions_per_image": [OWN] * IMAGES,
        "fingerprint": "f",
        "ended": float(number),
    }
    return Manifest.model_validate({**given, **fields})


def told(*manifests: Manifest, objectives: tuple[Objective, ...] = OBJECTIVES) -> list[Caveat]:
    return study_caveats(manifests, front(manifests, objectives), objectives, PROTOCOL)


GOOD = trial(1, answered(0.9), answered(0.2))
ROBUST = trial(2, answered(0.5), answered(0.4))
LUCK = answered(0.01)


def test_a_good_front_has_no_caveats() -> None:
    assert told(GOOD, ROBUST, trial(0, answered(0.7), answered(0.1), recipe="mat")) == []
    assert told() == []


def test_a_search_on_the_test_images_is_marked() -> None:
    seen = trial(1, answered(0.9), answered(0.2), split="test")
    (found,) = told(ROBUST, seen)
    assert found.text.startswith("searched on the test split (data.eval_split)")
    assert [entry.split for entry in front([ROBUST, seen], OBJECTIVES)] == ["test", "val"]


def test_chance_everywhere_says_nothing_at_all() -> None:
    found = told(trial(0, LUCK, answered(0)), trial(1, answered(0.02), answered(0.01)))
    assert [caveat.void for caveat in found] == [True]
    assert found[0].text.startswith("not one of 2 complete trials retrieves better than chance before any attack")
    assert "clean/mr_r1 is 0.020 [-0.007, 0.047], chance 0.010 (100 images, 500 captions)" in found[0].text
    assert "trial.model.base" in found[0].text


def test_a_member_of_the_front_at_chance_is_named() -> None:
    found = told(GOOD, trial(3, LUCK, answered(0.5)), trial(4, LUCK, answered(0)))
    assert [caveat.void for caveat in found] == [False]
    assert found[0].text.startswith("on the front, but no better than chance before any attack: s-t00003-s0 (clean/")


def test_untouched_models_are_named_and_are_void_if_there_are_no_others() -> None:
    why = {"untouched": "16 steps moved the weights by 2e-06 of their norm"}
    idle = [trial(number, answered(0.9 - number / 10), answered(number / 10), **why) for number in range(5)]
    found = told(GOOD, *idle)
    assert found[0].text.startswith("s-t00000-s0, s-t00001-s0, s-t00002-s0 and 2 more: the untouched base model")
    assert "moved the weights by 2e-06" in found[0].text
    assert not found[0].void
    assert told(*idle)[0].void


def test_trials_that_are_all_equal() -> None:
    found = told(*(trial(number, answered(0.9), answered(0.2)) for number in range(3)))
    assert [caveat.void for caveat in found] == [True]
    assert found[0].text.endswith("nothing can be concluded: clean/mr_r1 0.900, both/mr_r1 0.200")
    assert told(GOOD) == [], "one trial is equal to nothing"


def test_an_objective_in_which_all_are_equal() -> None:
    found = told(trial(1, answered(0.9), answered(0)), trial(2, answered(0.8), answered(0)))
    assert [caveat.void for caveat in found] == [False]
    assert found[0].text.startswith("both/mr_r1 is 0.000 in all 2 complete trials")
    assert "too strong" in found[0].text
    found = told(trial(1, answered(0.9), answered(0.2)), trial(2, answered(0.9), answered(0.3)))
    assert "clean/mr_r1 is 0.900 in all" in found[0].text
    assert "too strong" not in found[0].text
    found = told(trial(1, answered(0.9), answered(0.2)), trial(2, answered(0.8), answered(0.2)))
    assert "both/mr_r1 is 0.200 in all" in found[0].text
    assert "too strong" not in found[0].text


def test_an_attack_without_effect() -> None:
    same = [trial(number, answered(share), answered(share)) for number, share in enumerate((0.5, 0.6, 0.7))]
    found = [caveat.text for caveat in told(*same)]
    assert found[0].startswith("both: every query is answered as without an attack")
    assert found[1].startswith("s-t00002-s0 is best in every objective")


def test_a_gallery_that_is_smaller_than_asked() -> None:
    manifests = [GOOD, ROBUST]
    protocol = PROTOCOL.model_copy(update={"gallery_images": 150})
    (found,) = study_caveats(manifests, front(manifests, OBJECTIVES), OBJECTIVES, protocol)
    assert found.text.startswith("the gallery has 100 images, protocol.gallery_images asks for 150")


def test_the_same_images_tell_what_intervals_beside_each_other_do_not() -> None:
    """A searched trial that answers what a recipe does and 8 images more: 0.58 and 0.50 overlap, paired they do not."""
    recipe, more = answered(0.5), answered(0.58)
    assert (recipe <= more).all()
    defence = trial(0, answered(0.9), recipe, recipe="mat")
    better = trial(1, answered(0.9), more)
    assert better.metrics["both/mr_r1"].low < defence.metrics["both/mr_r1"].high
    other = trial(2, answered(0.3), answered(0.9))
    assert told(defence, better, other) == []
    unknown = {"correct": {}}
    (found,) = told(defence.model_copy(update=unknown), better.model_copy(update=unknown), other)
    assert found.text.startswith(
        "1 of 2 searched trials on the front cannot be told from a recipe on these 100 images:"
    )
    assert "s-t00001-s0 from mat (both/mr_r1 by 0.080 [-0.0" in found.text


def test_what_is_clearly_worse_in_one_objective_is_no_recipe() -> None:
    defence = trial(0, answered(0.9), answered(0.40), recipe="mat")
    traded = trial(1, answered(0.6), answered(0.41))
    assert told(defence, traded) == []


def test_members_like_a_recipe_are_named_with_the_largest_difference() -> None:
    defence = trial(0, answered(0.8), answered(0.30), recipe="mat")
    alike = trial(1, answered(0.81, seed=1), answered(0.33, seed=2))
    far = trial(2, answered(0.4), answered(0.7))
    (found,) = told(defence, alike, far)
    assert found.text.startswith("1 of 2 searched trials on the front cannot be told from a recipe")
    assert "s-t00001-s0 from mat (both/mr_r1 by 0.030 [" in found.text
    farther = trial(3, answered(0.76), answered(0.28), recipe="fare")
    (found,) = told(farther, defence, alike, far)
    assert "from mat" in found.text, "the nearest recipe is named"
    assert "from fare" not in found.text


def test_a_paired_interval_is_that_of_the_mean_difference() -> None:
    one, other = trial(0, answered(0.9), answered(0.4)), trial(1, answered(0.9), answered(0.3))
    first, second = estimates([one, other], OBJECTIVES)
    found = paired_difference(first, second, "both/mr_r1", 0.95)
    half = 1.96 * (answered(0.4) ^ answered(0.3)).std() / np.sqrt(IMAGES)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.1 - half, abs=0.012), pytest.approx(0.1 + half, abs=0.012))
    assert paired_difference(first, first, "both/mr_r1", 0.95) == Metric(value=0, low=0, high=0)


def test_captions_belong_to_their_images() -> None:
    """One image with nine captions and 99 with one: its captions are one draw, not nine."""
    counts = [9] + [1] * (IMAGES - 1)
    owner = np.repeat(np.arange(IMAGES), counts)

    def uneven(number: int, hits: np.ndarray) -> Manifest:
        bits = b64encode(np.packbits(hits[owner]).tobytes()).decode()
        metric = Metric(value=float(hits[owner].mean()), low=0, high=1)
        changes = {
            "metrics": {"both/ir_r1": metric},
            "correct": {"both/ir_r1": bits},
            "queries": {"tr": IMAGES, "ir": len(owner)},
            "captions_per_image": counts,
        }
        return trial(number, hits, hits, **changes)

    objectives = (Objective(metric="both/ir_r1"),)
    first_only = np.arange(IMAGES) == 0
    one, other = estimates([uneven(0, first_only), uneven(1, np.zeros(IMAGES, dtype=bool))], objectives)
    found = paired_difference(one, other, "both/ir_r1", 0.95)
    assert found.value == pytest.approx(9 / 108)
    assert found.low == pytest.approx(0, abs=1e-9), "more than one gallery in three lacks that image"


def test_replicates_are_taken_together() -> None:
    runs = [
        trial(0, answered(0.5), answered(0.2)),
        trial(1, answered(0.5), answered(0.4), key="s-t00000-s1", replicate=1),
    ]
    pair, other = estimates([*runs, trial(2, answered(0.5), answered(0.1))], OBJECTIVES)
    found = paired_difference(pair, other, "both/mr_r1", 0.95)
    assert found.value == pytest.approx(0.2)
    assert found.low < 0.2 < found.high


def test_many_differences_at_once_are_those_of_each_pair() -> None:
    """A plain reference, over more members than are taken at once, of which one's answers are not known."""
    draw = np.random.default_rng(0)
    members = [trial(number, draw.random(IMAGES) < draw.random(), draw.random(IMAGES) < 0.5) for number in range(130)]
    recipes = [trial(200 + number, draw.random(IMAGES) < 0.5, answered(0.5), recipe="mat") for number in range(3)]
    members[1] = members[1].model_copy(update={"correct": {}})
    ones, others = estimates(members, OBJECTIVES), estimates(recipes, OBJECTIVES)
    weights = resampled(IMAGES).T

    def bits(estimate: Estimate) -> np.ndarray:
        hits = [
            np.unpackbits(np.frombuffer(b64decode(run.correct["clean/tr_r1"]), np.uint8), count=IMAGES)
            for run in estimate.runs
        ]
        return np.mean(hits, axis=0)

    found = _differences(ones, others, "clean/mr_r1", 0.9)
    assert found.shape == (130, 3, 3)
    for one, row in zip(ones, found, strict=True):
        for other, (value, low, high) in zip(others, row, strict=True):
            first, second = one.metrics["clean/mr_r1"], other.metrics["clean/mr_r1"]
            assert value == first.value - second.value
            if one.first.number == 1:
                half = np.hypot((first.high - first.low) / 2, (second.high - second.low) / 2)
                assert (low, high) == pytest.approx((value - half, value + half))
            else:
                draws = weights @ (bits(one) - bits(other)) / IMAGES  # captions are answered as their images are
                assert (low, high) == pytest.approx(tuple(np.quantile(draws, [0.05, 0.95])), abs=1e-6)
