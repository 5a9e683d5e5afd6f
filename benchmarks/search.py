"""How fast the search finds the front: `python -m benchmarks.search`, which takes two cores half an hour.

Every method proposes points of the same space, runs them on the same number of virtual devices and may spend the same
device-seconds; equal points give equal results in equal seeds. What counts is the hypervolume of the noise-free values
of the complete trials. `stock` is what Ray's `OptunaSearch` does with several objectives: Optuna's TPE as it comes, and
no early stopping, because Ray's schedulers know one metric. It runs here on the same virtual clock, without Ray.
"""

from __future__ import annotations

import argparse
import math
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import optuna
from scipy.stats import wilcoxon
from threadpoolctl import threadpool_limits

from search_spaces.joint import JOINT
from search_spaces.recipes import Recipe
from study.config import Budget, EarlyStopping, Objective, StudyConfig
from study.execution.simulator import Clock, Course, Report, Surrogate, simulate
from study.front.dominance import oriented
from study.front.hypervolume import hypervolume_share
from study.ledger.ledger import Ledger
from study.search.samplers import make_sampler
from trainables.config import Point, Protocol, TrainingConfig, TrialConfig

GP = "optuna's gp"
SLOTS = 4
SHARE = 0.95
"""Of the best hypervolume that any method found within the budget in a seed: what the cost is measured to."""

PATIENCE = 3
"""How many budgets a method may spend to get there; beyond that, it counts as this."""

FRESH = 100
"""The first seed: lower ones were looked at while the study's own sampler was made."""


class Problem(typing.Protocol):
    """What trials do."""

    def course(self, trial: TrialConfig) -> Course:
        """What a trial reports."""

    def truth(self, point: Point) -> tuple[float, float]:
        """The two objectives without noise, both to be maximised."""


@dataclass(frozen=True)
class Tuned:
    """The simulator's fine-tuning."""

    surrogate: Surrogate

    def course(self, trial: TrialConfig) -> Course:
        """What a trial reports."""
        return self.surrogate.course(trial)

    def truth(self, point: Point) -> tuple[float, float]:
        """Clean and robust recall."""
        return self.surrogate.final(point, Protocol())


@dataclass(frozen=True)
class Analytic:
    """A test problem of the literature on the joint space, with epochs.

    The six knobs are the problem's variables in [0, 1]. After a part of the epochs, a trial is worse than at its end by
    an amount that differs from point to point, and everything has noise.
    """

    name: str
    seed: int = 0
    noise: float = 0.02

    def truth(self, point: Point) -> tuple[float, float]:
        """The two objectives of the problem, turned to maximisation."""
        choices = JOINT["attack_steps"].choices or ()
        first, *rest = (
            point.contrastive_weight,
            math.log(point.temperature / 0.01) / math.log(20),
            point.epsilon * 255 / 8,
            choices.index(max(1, point.attack_steps)) / (len(choices) - 1),
            point.words / 2,
            float(point.temperature_learned),
        )
        if self.name == "dtlz2":
            far = 1 + sum((value - 0.5) ** 2 for value in rest)
            return 1 - far * math.cos(first * math.pi / 2) / 2, 1 - far * math.sin(first * math.pi / 2) / 2
        far = 1 + 9 * sum(rest) / len(rest)
        shape = {"zdt1": math.sqrt(first / far), "zdt2": (first / far) ** 2}[self.name]
        return 1 - first, 1 - far * (1 - shape) / 5

    def course(self, trial: TrialConfig) -> Course:
        """Ten device-seconds an epoch."""
        rng = np.random.default_rng([self.seed, int(1e6 * trial.point.temperature), int(1e6 * trial.point.epsilon)])
        truth, late = self.truth(trial.point), rng.uniform(0.1, 0.5)
        reports = []
        for epoch in range(1, trial.training.epochs + 1):
            lag = late * (1 - epoch / trial.training.epochs)
            values = [value - lag + self.noise * rng.standard_normal() for value in truth]
            reports.append(Report(10.0 * epoch, dict(zip(("clean/mr_r5", "both/mr_r5"), values, strict=True))))
        return Course(reports)


def methods() -> dict[str, tuple[EarlyStopping, Callable[[int], optuna.samplers.BaseSampler | None]]]:
    """By name: early stopping, and the sampler of a seed; None is the study's own."""
    off = EarlyStopping(enabled=False)
    return {
        "ours": (EarlyStopping(), lambda seed: None),
        "ours without stopping": (off, lambda seed: None),
        GP: (
            off,
            lambda seed: optuna.samplers.GPSampler(
                seed=seed, deterministic_objective=False, warn_independent_sampling=False
            ),
        ),
        "stock": (off, lambda seed: optuna.samplers.TPESampler(seed=seed)),
        "nsga2": (off, lambda seed: optuna.samplers.NSGAIISampler(seed=seed)),
        "random": (off, lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    }


def curve(name: str, method: str, seed: int) -> Iterator[tuple[float, float]]:
    """One study, which goes on for as long as somebody asks.

    Args:
        name: a key of `PROBLEMS`.
        method: a key of `methods`.
        seed: of the problem and the sampler.

    Yields:
        As each trial ends: device-seconds held by those that ended so far, and the hypervolume share of their truth.
    """
    make, epochs, trials, _, recipes = PROBLEMS[name]
    problem, (stopping, sampler) = make(seed), methods()[method]
    config = StudyConfig(
        recipes=recipes,
        objectives=(Objective(metric="clean/mr_r5"), Objective(metric="both/mr_r5")),
        budget=Budget(trials=trials),
        early_stopping=stopping,
        seed=seed,
    )
    endless = config.model_copy(update={"budget": Budget(trials=1_000_000)})
    clock = Clock()
    ledger = Ledger(endless, None, "benchmark", clock, sampler(seed) or make_sampler(config, 0))
    template = TrialConfig(training=TrainingConfig(epochs=epochs))
    held, found, share = 0.0, np.empty((0, 2)), 0.0
    for ended in simulate(ledger, template, problem.course, SLOTS, clock):
        held += ended.cost.get("device_seconds", 0.0)
        if ended.state == "complete":
            truth = problem.truth(Point.model_validate(ended.point))
            found = np.vstack([found, oriented([truth], config.objectives)])
            share = hypervolume_share(found)
        yield held, share


def race(name: str, seed: int, left_out: Collection[str]) -> dict[str, tuple[float, float]]:
    """All methods on one problem with one seed.

    Returns:
        By method: the hypervolume share that it found within the budget, and its device-seconds to `SHARE` of the best
        of these; at most `PATIENCE` budgets.
    """
    _, _, trials, trial_seconds, _ = PROBLEMS[name]
    budget = trials * trial_seconds
    going = {method: curve(name, method, seed) for method in methods() if method not in left_out}
    curves = {method: [(0.0, 0.0)] for method in going}
    for method, points in going.items():
        while curves[method][-1][0] <= budget:
            curves[method].append(next(points))
    found = {method: max(share for seconds, share in points if seconds <= budget) for method, points in curves.items()}
    target = SHARE * max(found.values())
    for method, points in going.items():
        while curves[method][-1][1] < target and curves[method][-1][0] < PATIENCE * budget:
            curves[method].append(next(points))
    costs = {
        method: min(next((seconds for seconds, share in points if share >= target), math.inf), PATIENCE * budget)
        for method, points in curves.items()
    }
    return {method: (found[method], costs[method]) for method in going}


def quartiles(values: Sequence[float], form: str) -> str:
    """Median with quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def paired(ratios: Sequence[float]) -> str:
    """p of the Wilcoxon signed-rank test that the ratios' logarithms are centred at 0; empty where all are 1."""
    logs = np.log(ratios)
    return f"{wilcoxon(logs).pvalue:.1g}" if logs.any() else ""


def show(name: str, races: Sequence[dict[str, tuple[float, float]]]) -> None:
    """Print one problem's table, a race for each seed."""
    _, epochs, trials, seconds, _ = PROBLEMS[name]
    costs = {method: [of_seed[method][1] for of_seed in races] for method in races[0]}
    print(f"\n{name}: {epochs} epochs, device-seconds of {trials} full trials, {len(races)} seeds, {SLOTS} at once")
    print(f"{'':24}{'hypervolume in budget':28}{'cost to 95 %':30}{'reached':10}{'times stock':24}p")
    for method, cost in costs.items():
        count = sum(spent < PATIENCE * trials * seconds for spent in cost)
        ratio = [own / other for own, other in zip(cost, costs["stock"], strict=True)]
        print(
            f"{method:24}{quartiles([of_seed[method][0] for of_seed in races], '.3f'):28}{quartiles(cost, '.0f'):30}"
            f"{f'{count}/{len(races)}':10}{quartiles(ratio, '.2f'):24}{paired(ratio)}"
        )
    best = [own / other for own, other in zip(costs["ours"], costs["random"], strict=True)]
    print(f"ours against random: {quartiles(best, '.2f')} times its cost, p {paired(best)}", flush=True)


KNOWN: tuple[Recipe, ...] = ("finetune", "tecoa_itr", "fare", "mat")

PROBLEMS: dict[str, tuple[Callable[[int], Problem], int, int, float, tuple[Recipe, ...]]] = {
    "fine-tuning, quickstart": (lambda seed: Tuned(Surrogate(seed=seed)), 3, 12, 16.0, ()),
    "fine-tuning, recipes first": (lambda seed: Tuned(Surrogate(seed=seed)), 3, 16, 16.0, KNOWN),
    "fine-tuning, long": (lambda seed: Tuned(Surrogate(seed=seed)), 9, 80, 36.0, ()),
    "zdt1": (lambda seed: Analytic("zdt1", seed), 9, 80, 90.0, ()),
    "zdt2": (lambda seed: Analytic("zdt2", seed), 9, 80, 90.0, ()),
    "dtlz2": (lambda seed: Analytic("dtlz2", seed), 9, 80, 90.0, ()),
}
"""By name: problem of a seed, epochs, trials' worth of device-seconds, device-seconds of a full trial, and the recipes
that every method begins with and pays for."""


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=FRESH)
    parser.add_argument("--problem", choices=[*PROBLEMS], action="append", help="only this one; may be repeated")
    parser.add_argument("--gp", action="store_true", help="Optuna's Gaussian processes, too: minutes a study")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parser().parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    left_out = () if options.gp else (GP,)
    with ProcessPoolExecutor(initializer=_quiet) as pool:
        for name in PROBLEMS:
            if not options.problem or name in options.problem:
                show(name, list(pool.map(partial(race, name, left_out=left_out), seeds)))
    return 0


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    threadpool_limits(1)  # seeds are what runs side by side


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
