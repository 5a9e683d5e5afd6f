"""Errors over images and over seeds, against plain references written from the textbook's definitions."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, t

from study.config import Objective
from study.front.caveats import paired_difference
from study.front.estimates import CHANCES, estimates, front, near_front
from study.front.paired import DRAWS, image_errors, resampled, training_noise
from study.records import Manifest
from trainables.results import Metric

CLEAN, BOTH = Objective(metric="clean/mr_r1"), Objective(metric="both/mr_r1")
COST = Objective(metric="cost/device_seconds", direction="minimize", low=0, high=100)


def packed(bits: np.ndarray) -> str:
    return b64encode(np.packbits(bits).tobytes()).decode()


def run(number: int, replicate: int, counts: Sequence[int], answers: dict[str, np.ndarray], **fields: Any) -> Manifest:
    """A trial with these bits by `target/direction_r1`; intervals are those of independent images."""
    owners = np.repeat(np.arange(len(counts)), counts)
    metrics = {}
    for target in {name.partition("/")[0] for name in answers}:
        tr, ir = answers[f"{target}/tr_r1"], answers[f"{target}/ir_r1"]
        image = (tr + np.bincount(owners, ir, len(counts)) / np.array(counts)) / 2
        value, half = (tr.mean() + ir.mean()) / 2, 1.96 * image.std() / len(counts) ** 0.5
        metrics[f"{target}/mr_r1"] = Metric(value=value, low=value - half, high=value + half)
    given: dict[str, Any] = {
        "key": f"s-t{number:05d}-s{replicate}",
        "number": number + 1000 * replicate,
        "replicate": replicate,
        "recipe": None,
        "params": {},
        "point": {},
        "state": "complete",
        "metrics": metrics,
        "cost": {"device_seconds": 10.0 + number + replicate},
        "correct": {name: packed(bits) for name, bits in answers.items()},
        "queries": {"tr": len(counts), "ir": len(owners)},
        "captions_per_image": list(counts),
        "fingerprint": "f",
        "ended": float(number),
    }
    return Manifest.model_validate({**given, **fields})


def drawn_run(rng: np.random.Generator, number: int, replicate: int, counts: Sequence[int], share: float) -> Manifest:
    sizes = {"tr": len(counts), "ir": sum(counts)}
    answers = {
        f"{target}/{direction}_r1": rng.random(size) < part
        for target, part in (("clean", share), ("both", share / 2))
        for direction, size in sizes.items()
    }
    return run(number, replicate, counts, answers)


def recall_of_gallery(manifest: Manifest, target: str, images: Sequence[int], counts: Sequence[int]) -> float:
    """Mean recall of a gallery of these images, some of them several times, each with all its captions."""
    first = np.cumsum([0, *counts])
    bits = {
        direction: np.unpackbits(np.frombuffer(b64decode(manifest.correct[f"{target}/{direction}_r1"]), np.uint8))
        for direction in ("tr", "ir")
    }
    right = asked = found = 0
    for image in images:
        found += int(bits["tr"][image])
        for caption in range(first[image], first[image + 1]):
            asked += 1
            right += int(bits["ir"][caption])
    return (found / len(images) + right / asked) / 2


def galleries(images: int) -> list[list[int]]:
    """The drawn ones, as lists of images."""
    return [
        [image for image in range(images) for _ in range(int(resampled(images)[image, draw]))] for draw in range(DRAWS)
    ]


COUNTS = [1, 3, 2, 5, 1, 2, 4, 1, 2, 2, 3, 1]


def test_draws_are_galleries_of_images_with_all_their_captions() -> None:
    rng = np.random.default_rng(0)
    runs = [drawn_run(rng, number, 0, COUNTS, 0.3 * number) for number in range(1, 4)]
    runs.append(runs[0].model_copy(update={"correct": {}}))
    runs.append(drawn_run(rng, 5, 0, [2] * 7, 0.5))
    found = image_errors(runs, [CLEAN.metric, BOTH.metric, COST.metric])
    assert found.shape == (5, 3, DRAWS)
    for counts, rows in ((COUNTS, (0, 1, 2)), ([2] * 7, (4,))):
        for gallery, draw in zip(galleries(len(counts))[:50], range(50), strict=True):
            for row in rows:
                for column, objective in enumerate((CLEAN, BOTH)):
                    off = recall_of_gallery(runs[row], objective.metric[:-6], gallery, counts)
                    off -= runs[row].metrics[objective.metric].value
                    assert found[row, column, draw] == pytest.approx(off, abs=1e-6)
    assert np.isnan(found[3, :2]).all(), "nobody knows what it answered"
    assert not found[:, 2].any(), "costs do not depend on images"
    assert resampled(12).sum(0).tolist() == [12] * DRAWS
    assert abs(np.corrcoef(resampled(12)[0], resampled(13)[0])[0, 1]) < 0.1


def two_level(rng: np.random.Generator, points: int, runs: int, images: int, seed: float) -> list[list[np.ndarray]]:
    """Which images each run of each point answers: hard and easy images, and seeds that are good or bad."""
    hard = rng.standard_normal(images)
    return [
        [hard + 0.8 * rng.standard_normal(images) + seed * rng.standard_normal() > 0.2 * point for _ in range(runs)]
        for point in range(points)
    ]


def manifests_of(answers: list[list[np.ndarray]], images: int) -> list[Manifest]:
    return [
        run(
            number,
            replicate,
            [1] * images,
            {f"{target}/{d}_r1": bits for target in ("clean", "both") for d in ("tr", "ir")},
        )
        for number, runs in enumerate(answers)
        for replicate, bits in enumerate(runs)
    ]


def test_noise_of_training_is_the_variance_component_of_a_two_way_layout() -> None:
    """One answer a cell, rows are runs and columns images: (MS rows - MS rest) / images, pooled over the points."""
    points, runs, images = 4, 3, 200
    answers = two_level(np.random.default_rng(1), points, runs, images, 0.4)
    squares = rest = 0.0
    for table in np.array(answers, dtype=float):
        for row in range(runs):
            squares += images * (table[row].mean() - table.mean()) ** 2
            for column in range(images):
                rest += (table[row, column] - table[row].mean() - table[:, column].mean() + table.mean()) ** 2
    mean_square, rest_square = squares / (points * (runs - 1)), rest / (points * (runs - 1) * (images - 1))
    expected = (mean_square - rest_square) / images
    grouped = [manifests_of(answers, images)[start : start + runs] for start in range(0, points * runs, runs)]
    names = [CLEAN.metric, COST.metric]
    values = [np.array([[one.metrics[CLEAN.metric].value, one.cost["device_seconds"]] for one in p]) for p in grouped]
    found = training_noise(grouped, values, names)
    assert found.freedom == points * (runs - 1)
    assert found.covariance[0, 0] == pytest.approx(expected, rel=0.05)
    assert found.covariance[1, 1] == pytest.approx(1.0), "seconds 10, 11 and 12: their sample variance"
    half = t.ppf(0.9, points * (runs - 1)) * (expected / runs) ** 0.5
    assert found.half(CLEAN.metric, runs, 0.8) == pytest.approx(half, rel=0.03)
    draws = found.errors([1, 4])
    assert draws[1, 0].std() == pytest.approx(draws[0, 0].std() / 2, rel=0.1)
    once = training_noise([p[:1] for p in grouped], [v[:1] for v in values], names)
    assert (once.freedom, once.half(CLEAN.metric, 1, 0.95)) == (0, 0.0)
    assert not once.errors([1]).any()


def test_intervals_are_those_of_images_and_seeds_together() -> None:
    """Of a study in which one point has three runs, another one."""
    images = 300
    answers = two_level(np.random.default_rng(2), 2, 3, images, 0.5)
    trials = manifests_of([answers[0], answers[1][:1]], images)
    repeated, single = estimates(trials, [BOTH], 0.9)
    table = np.array(answers[0], dtype=float)
    over_images = table.mean(0).std(ddof=1) / images**0.5
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    seed = max(0.0, table.mean(1).var(ddof=1) - (rest**2).sum() / 2 / (images - 1) / images) ** 0.5
    for estimate, runs, deviation in ((repeated, 3, over_images), (single, 1, np.std(answers[1][0]) / images**0.5)):
        metric = estimate.metrics[BOTH.metric]
        half = np.hypot(norm.ppf(0.95) * deviation, t.ppf(0.95, 2) * seed / runs**0.5)
        low, high = max(0.0, metric.value - half), min(1.0, metric.value + half)
        at = (1.96 / 1.645 if runs == 1 else 1.0) * 0.1  # a trial's own interval here is of 95 %
        assert (metric.low, metric.high) == pytest.approx((low, high), rel=0.1, abs=at * deviation)
    difference = paired_difference(repeated, single, BOTH.metric, 0.9)
    paired = (table.mean(0) - answers[1][0]).std(ddof=1) / images**0.5
    half = np.hypot(norm.ppf(0.95) * paired, t.ppf(0.95, 2) * seed * (1 / 3 + 1) ** 0.5)
    assert difference.high - difference.value == pytest.approx(half, rel=0.1)


def test_a_study_without_replicates_keeps_the_intervals_of_its_runs() -> None:
    trials = manifests_of(two_level(np.random.default_rng(3), 3, 1, 50, 0.0), 50)
    for trial, estimate in zip(trials, estimates(trials, [CLEAN, BOTH]), strict=True):
        assert estimate.metrics == trial.metrics


def on_front(costs: np.ndarray) -> np.ndarray:
    """By its definition."""
    return np.array(
        [not any((other <= one).all() and (other < one).any() for other in costs) for one in costs], dtype=bool
    )


def test_probability_is_the_share_of_galleries_on_whose_front_a_point_is() -> None:
    """One gallery for all trials at once."""
    rng, objectives = np.random.default_rng(4), [CLEAN, BOTH]
    trials = [drawn_run(rng, number, 0, COUNTS, 0.35 + 0.03 * number) for number in range(6)]
    shares = np.zeros(6)
    for gallery in galleries(len(COUNTS))[:CHANCES]:
        recalls = [[recall_of_gallery(one, o.metric[:-6], gallery, COUNTS) for o in objectives] for one in trials]
        shares += on_front(-np.round(recalls, 6)) / CHANCES
    found = {entry.key: entry.probability for entry in front(trials, objectives)}
    assert found
    for trial, share in zip(trials, shares, strict=True):
        if trial.key in found:
            assert found[trial.key] == pytest.approx(share, abs=1e-9)
    near = {one.key for one, share in zip(trials, shares, strict=True) if share >= 0.05}
    assert near_front(trials, objectives) == near | found.keys()


def test_the_same_images_tell_which_of_two_is_better() -> None:
    """One answers all that the other does and a few more: every gallery that tells them apart says so."""
    bits = np.arange(400) % 2 == 0
    more = bits | (np.arange(400) % 50 == 1)
    trials = manifests_of([[bits], [more]], 400)
    (entry,) = front(trials, [CLEAN])
    assert (entry.key, entry.probability) == ("s-t00001-s0", 1.0)
    assert near_front(trials, [CLEAN]) == {"s-t00001-s0"}
    unknown = [trial.model_copy(update={"correct": {}}) for trial in trials]
    (entry,) = front(unknown, [CLEAN])
    assert 0.5 < entry.probability < 0.8, "as if their images were others"
    assert len(near_front(unknown, [CLEAN])) == 2


def test_two_that_no_image_tells_apart_differ_by_little_at_most() -> None:
    trials = manifests_of([[np.zeros(100, bool)], [np.zeros(100, bool)]], 100)
    one, other = estimates(trials, [CLEAN])
    most = 1.96**2 / (100 + 1.96**2)
    found = paired_difference(one, other, CLEAN.metric, 0.95)
    assert (found.value, found.low, found.high) == pytest.approx((0, -most, most), rel=1e-3)
    assert paired_difference(one, one, CLEAN.metric, 0.95) == Metric(value=0, low=0, high=0)


def test_order_decides_nothing() -> None:
    answers = two_level(np.random.default_rng(5), 4, 2, 60, 0.3)
    trials = manifests_of(answers, 60)
    shown = [front(some, [CLEAN, COST]) for some in (trials, trials[::-1])]
    assert shown[0] == shown[1]


def test_more_than_are_drawn_at_once_are_each_what_they_are_alone() -> None:
    rng = np.random.default_rng(6)
    trials = [drawn_run(rng, number, 0, [1, 2] * 10, 0.5) for number in range(150)]
    together = image_errors(trials, [CLEAN.metric])
    for place in (0, 127, 128, 149):
        np.testing.assert_allclose(image_errors([trials[place]], [CLEAN.metric])[0], together[place], atol=1e-6)
