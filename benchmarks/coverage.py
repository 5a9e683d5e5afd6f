"""How often intervals of simulated studies hold what is true: of values, of differences, and of who is on the front.

`python -m benchmarks.coverage` draws studies whose truth is known, measures them as studies are measured, and prints
the table. A query is answered if the sum of normal variables is above 0: how good the point is, how hard the image is
for every model, how hard it is for this point, how the seed turned out, and chance. So recalls of a point over all
images and seeds are known. With one run a point, the truth is that of the models that were trained; else that of the
points.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from study.config import Objective
from study.front.caveats import paired_difference
from study.front.dominance import front_mask, oriented
from study.front.estimates import NEAR, Estimate, estimates, probabilities
from study.records import Manifest
from trainables.evaluation.intervals import share_interval
from trainables.evaluation.measures import gallery_weights, recalls
from trainables.evaluation.retrieval import Ranks

OBJECTIVES = (Objective(metric="clean/mr_r1"), Objective(metric="both/mr_r1"))
CONFIDENCE = 0.95
CAPTIONS = 2
"""Of each image."""
IMAGE, OWN, CHANCE = 0.8, 0.4, 0.45
"""Standard deviations of what makes an image hard for all, hard for a point, and of a single query of one run."""
BINS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Edges of probabilities that are compared with how often they came true."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Study:
    """What is known and what is true.

    Attributes:
        manifests: of its trials.
        truth: recalls, (points, objectives).
    """

    manifests: list[Manifest]
    truth: Floats


def drawn_study(rng: np.random.Generator, points: int, runs: int, images: int, seed_deviation: float) -> Study:
    """Points on and behind a trade-off between two recalls, each trained with so many seeds."""
    place = rng.random(points)
    behind = rng.exponential(0.15, points) * (rng.random(points) < 0.7)
    level = np.column_stack([0.9 * place, -1.2 * place]) - behind[:, None]
    hard = IMAGE * rng.standard_normal((2, images))
    own = OWN * rng.standard_normal((points, 2, images))
    luck = rng.standard_normal((points, runs, 1))  # of a seed, in both objectives
    seeds = seed_deviation * np.sqrt(0.5) * (luck + rng.standard_normal((points, runs, 2)))
    centre = level[:, None, :, None] + seeds[..., None] + (hard + own)[:, None]  # points, runs, objectives, images
    tr = centre + CHANCE * rng.standard_normal(centre.shape) > 0
    owners = np.repeat(np.arange(images), CAPTIONS)
    ir = centre[..., owners] + CHANCE * rng.standard_normal((*centre.shape[:3], len(owners))) > 0
    spread = IMAGE**2 + OWN**2 + CHANCE**2
    if runs == 1:
        truth = norm.cdf((level + seeds[:, 0]) / np.sqrt(spread))
    else:
        truth = norm.cdf(level / np.sqrt(spread + seed_deviation**2))
    weights = gallery_weights(images, 400, 0)
    made = []
    for point, run in np.ndindex(points, runs):
        answers = {
            objective.metric.partition("/")[0]: (tr[point, run, place], ir[point, run, place])
            for place, objective in enumerate(OBJECTIVES)
        }
        made.append(_manifest(point, run, answers, owners, weights))
    return Study(made, truth)


def _manifest(
    point: int,
    run: int,
    answers: dict[str, tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]],
    owners: npt.NDArray[np.int64],
    weights: Floats,
) -> Manifest:
    metrics, correct = {}, {}
    for target, hits in answers.items():
        ranks = Ranks(np.where(hits[0], 1, 2), np.where(hits[1], 1, 2), owners)
        measure = recalls(ranks, (1,), weights)["mr_r1"]
        metrics[f"{target}/mr_r1"] = share_interval(measure, weights.shape[1], CONFIDENCE)
        for direction, bits in zip(("tr", "ir"), hits, strict=True):
            correct[f"{target}/{direction}_r1"] = base64.b64encode(np.packbits(bits).tobytes()).decode()
    return Manifest(
        key=f"s-t{point:05d}-s{run}",
        number=point,
        replicate=run,
        recipe=None,
        params={},
        point={},
        state="complete",
        metrics=metrics,
        correct=correct,
        queries={"tr": weights.shape[1], "ir": len(owners)},
        captions_per_image=[CAPTIONS] * weights.shape[1],
        fingerprint="",
        ended=0.0,
    )


@dataclass
class Coverage:
    """What held, study after study.

    Attributes:
        values: whether the interval of a value has the truth.
        differences: the same of the difference of two points.
        widths: of the intervals of differences.
        apart: the same, if the two had been measured on different images.
        said: probabilities to be on the front.
        came: whether the point is on the front of what is true.
    """

    values: list[bool] = field(default_factory=list)
    differences: list[bool] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    said: list[float] = field(default_factory=list)
    came: list[bool] = field(default_factory=list)

    def add(self, study: Study) -> None:
        """One more."""
        found = estimates(study.manifests, OBJECTIVES, CONFIDENCE)
        metrics = [[one.metrics[objective.metric] for objective in OBJECTIVES] for one in found]
        for row, truths in zip(metrics, study.truth, strict=True):
            self.values += [one.low <= truth <= one.high for one, truth in zip(row, truths, strict=True)]
        for one in range(0, len(found) - 1, 2):
            for place, objective in enumerate(OBJECTIVES):
                self._difference(study, found, one, place, objective)
        self.said += probabilities(found, OBJECTIVES, CONFIDENCE).tolist()
        self.came += front_mask(oriented(study.truth, OBJECTIVES)).tolist()

    def _difference(self, study: Study, found: Sequence[Estimate], one: int, place: int, objective: Objective) -> None:
        got = paired_difference(found[one], found[one + 1], objective.metric, CONFIDENCE)
        self.differences.append(got.low <= study.truth[one, place] - study.truth[one + 1, place] <= got.high)
        first, second = (found[index].metrics[objective.metric] for index in (one, one + 1))
        self.widths.append(got.high - got.low)
        self.apart.append(math.hypot(first.high - first.low, second.high - second.low))

    @property
    def near(self) -> float:
        """Share of the points that are on the front which are said to be on it or near."""
        said, came = np.array(self.said), np.array(self.came)
        return float((said[came] >= NEAR).mean())

    def calibration(self) -> list[tuple[float, float, int]]:
        """For each of `BINS`: mean of what was said, share that came true, and how many."""
        said, came = np.array(self.said), np.array(self.came)
        places = np.clip(np.digitize(said, BINS) - 1, 0, len(BINS) - 2)
        some = [places == place for place in range(len(BINS) - 1)]
        return [
            (float(said[one].mean()), float(came[one].mean()), int(one.sum())) if one.any() else (0.0, 0.0, 0)
            for one in some
        ]


def covered(studies: int, points: int, runs: int, images: int, seed_deviation: float, seed: int = 0) -> Coverage:
    """Of so many studies."""
    rng, found = np.random.default_rng([seed, runs]), Coverage()
    for _ in range(studies):
        found.add(drawn_study(rng, points, runs, images, seed_deviation))
    return found


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="runs of each point")
    parser.add_argument("--seed-deviation", type=float, default=0.1, help="of a recall of one half about 0.04")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = parser().parse_args(arguments)
    bins = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(BINS)]
    heads = ["seeds", "values", "differences", "width, unpaired = 1", "members said near", *bins]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for runs in options.seeds:
        found = covered(options.studies, options.points, runs, options.images, options.seed_deviation)
        shares = [np.mean(found.values), np.mean(found.differences)]
        cells = [f"{100 * share:.1f} %" for share in shares]
        cells += [f"{np.mean(found.widths) / np.mean(found.apart):.2f}", f"{100 * found.near:.1f} %"]
        cells += [f"{said:.2f}: {came:.2f} of {count}" for said, came, count in found.calibration()]
        print(f"| {runs} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
