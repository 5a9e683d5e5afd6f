"""How fast the search finds the front: `python -m benchmarks.search`, which takes a core about two hours.

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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from scipy.stats import wilcoxon

from search_spaces.joint import JOINT
from study.config import Budget, EarlyStopping, Objective, StudyConfig
from study.ledger import Ledger
from study.pareto import hypervolume_history
from study.samplers import make_sampler
from study.simulator import Clock, Course, Report, Surrogate, simulate
from trainables.config import Point, Protocol, TrainingConfig, TrialConfig
from trainables.results import Metric

Curve = list[tuple[float, float]]
"""Device-seconds held by ended trials, and the hypervolume share they found."""

GP = "optuna's gp"
SLOTS = 4
SHARE = 0.95
"""Of the best hypervolume that any method found within the budget in a seed: what the cost is measured to."""

PATIENCE = (1.5, 3.0)
"""How many budgets a method that did not get there may spend to do so; beyond that, it counts as the last of them."""


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


def run(
    problem: Problem,
    stopping: EarlyStopping,
    sampler: optuna.samplers.BaseSampler | None,
    *,
    epochs: int,
    trials: int,
    device_seconds: float,
    seed: int,
) -> Curve:
    """One study; its curve.

    Args:
        problem: what trials do.
        stopping: early, or not.
        sampler: None is the study's own.
        epochs: of a trial.
        trials: the budget that the study's own sampler is told.
        device_seconds: what ends the study, however many trials they suffice for.
        seed: of the sampler.
    """
    config = StudyConfig(
        recipes=(),
        objectives=(Objective(metric="clean/mr_r5"), Objective(metric="both/mr_r5")),
        budget=Budget(trials=trials),
        early_stopping=stopping,
        seed=seed,
    )
    endless = config.model_copy(update={"budget": Budget(trials=1_000_000)})
    clock = Clock()
    ledger = Ledger(endless, None, "benchmark", clock, sampler or make_sampler(config, 0))
    template = TrialConfig(training=TrainingConfig(epochs=epochs))
    simulate(ledger, template, problem.course, SLOTS, clock, device_seconds / SLOTS)
    exact = []
    for manifest in ledger.manifests():
        if manifest.state == "complete":
            clean, robust = problem.truth(Point.model_validate(manifest.point))
            values = {"clean/mr_r5": clean, "both/mr_r5": robust}
            metrics = {name: Metric(value=value, low=value, high=value) for name, value in values.items()}
            manifest = manifest.model_copy(update={"metrics": metrics})
        exact.append(manifest)
    return [(seconds, share) for _, _, seconds, share in hypervolume_history(exact, config.objectives)]


def share_at(curve: Curve, device_seconds: float) -> float:
    """Hypervolume share by then."""
    return max((share for seconds, share in curve if seconds <= device_seconds), default=0.0)


def cost_to(curve: Curve, target: float, otherwise: float) -> float:
    """Device-seconds until the share is reached."""
    return next((seconds for seconds, share in curve if share >= target), otherwise)


def quartiles(values: Sequence[float], form: str) -> str:
    """Median with quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def paired(ratios: Sequence[float]) -> str:
    """p of the Wilcoxon signed-rank test that the ratios' logarithms are centred at 0; empty where all are 1."""
    logs = np.log(ratios)
    return f"{wilcoxon(logs).pvalue:.1g}" if logs.any() else ""


def compare(
    name: str,
    make: Callable[[int], Problem],
    epochs: int,
    trials: int,
    trial_seconds: float,
    seeds: int,
    left_out: Collection[str],
) -> None:
    """Print one problem's table.

    Args:
        name: of the problem.
        make: the problem of a seed.
        epochs: of a trial.
        trials: full trials that the device-seconds suffice for.
        trial_seconds: of a full trial.
        seeds: how many.
        left_out: methods.
    """
    budget = trials * trial_seconds
    used = {method: how for method, how in methods().items() if method not in left_out}

    def curve(method: str, seed: int, spent: float) -> Curve:
        stopping, sampler = used[method]
        spent += 2 * SLOTS * trial_seconds  # a curve counts ended trials, and some are running all the time
        return run(make(seed), stopping, sampler(seed), epochs=epochs, trials=trials, device_seconds=spent, seed=seed)

    curves = {method: [curve(method, seed, budget) for seed in range(seeds)] for method in used}
    found = {method: [share_at(of_seed, budget) for of_seed in of_method] for method, of_method in curves.items()}
    targets = [SHARE * max(of_seed) for of_seed in zip(*found.values(), strict=True)]
    costs: dict[str, list[float]] = {method: [] for method in used}
    for method, of_method in curves.items():
        for seed, target in enumerate(targets):
            costs[method].append(cost_to(of_method[seed], target, math.inf))
            for budgets in PATIENCE:
                if not math.isfinite(costs[method][-1]):
                    costs[method][-1] = cost_to(curve(method, seed, budgets * budget), target, math.inf)
    costs = {method: [min(cost, PATIENCE[-1] * budget) for cost in of_method] for method, of_method in costs.items()}
    print(f"\n{name}: {epochs} epochs, device-seconds of {trials} full trials, {seeds} seeds, {SLOTS} at once")
    print(f"{'':24}{'hypervolume in budget':28}{'cost to 95 %':30}{'reached':10}{'times stock':24}p")
    for method, cost in costs.items():
        count = sum(seconds < PATIENCE[-1] * budget for seconds in cost)
        ratio = [own / other for own, other in zip(cost, costs["stock"], strict=True)]
        print(
            f"{method:24}{quartiles(found[method], '.3f'):28}{quartiles(cost, '.0f'):30}{f'{count}/{seeds}':10}"
            f"{quartiles(ratio, '.2f'):24}{paired(ratio)}",
            flush=True,
        )
    best = [own / other for own, other in zip(costs["ours"], costs["random"], strict=True)]
    print(f"ours against random: {quartiles(best, '.2f')} times its cost, p {paired(best)}")


PROBLEMS: dict[str, tuple[Callable[[int], Problem], int, int, float]] = {
    "fine-tuning, quickstart": (lambda seed: Tuned(Surrogate(seed=seed)), 3, 12, 16.0),
    "fine-tuning, long": (lambda seed: Tuned(Surrogate(seed=seed)), 9, 80, 36.0),
    "zdt1": (lambda seed: Analytic("zdt1", seed), 9, 80, 90.0),
    "zdt2": (lambda seed: Analytic("zdt2", seed), 9, 80, 90.0),
    "dtlz2": (lambda seed: Analytic("dtlz2", seed), 9, 80, 90.0),
}
"""By name: problem of a seed, epochs, trials' worth of device-seconds, device-seconds of a full trial."""


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--problem", choices=[*PROBLEMS], action="append", help="only this one; may be repeated")
    parser.add_argument("--gp", action="store_true", help="Optuna's Gaussian processes, too: minutes a study")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name, (make, epochs, trials, seconds) in PROBLEMS.items():
        if not options.problem or name in options.problem:
            compare(name, make, epochs, trials, seconds, options.seeds, () if options.gp else (GP,))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
