"""Samplers by name: how searched points are proposed."""

from __future__ import annotations

from typing import Literal

import optuna

from study.config import StudyConfig

GP_TRIALS = 200
"""Up to here a Gaussian process answers within seconds; its time grows with the cube of the trials."""


def resolve(config: StudyConfig) -> tuple[Literal["tpe", "gp", "nsga2", "nsga3", "qmc", "random"], str]:
    """The sampler that `auto` stands for, and what to tell the user; empty where there is nothing to tell."""
    if config.sampler == "gp" and config.early_stopping.enabled:
        return "gp", (
            "sampler gp learns nothing from trials that are stopped early, and proposes their like again; "
            "use --early-stopping.enabled false with it, or --sampler tpe"
        )
    if config.sampler != "auto":
        return config.sampler, ""
    if config.early_stopping.enabled:
        return "tpe", "sampler auto: tpe, because it learns from trials that are stopped early, too"
    if config.budget.trials > GP_TRIALS:
        return "tpe", f"sampler auto: tpe, because a Gaussian process is slow beyond {GP_TRIALS} trials"
    return "gp", f"sampler auto: gp, because all of up to {GP_TRIALS} trials run to the end"


def make_sampler(config: StudyConfig, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler by name.

    Args:
        config: of the study.
        trials: how many there are already. It is part of the seed, so that a resumed study does not draw again what it
            drew first.
    """
    seed, budget = config.seed * 1_000_003 + trials, config.budget.trials
    startup = min(10, 2 + budget // 4)  # a small budget cannot spend ten trials on random points
    population = max(8, min(50, budget // 5))  # Optuna's 50 would be random search for most budgets
    match resolve(config)[0]:
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "qmc":  # every session goes on in the one sequence of the study's seed
            return optuna.samplers.QMCSampler(seed=config.seed, scramble=True, warn_independent_sampling=False)
        case "gp":
            return optuna.samplers.GPSampler(
                seed=seed,
                n_startup_trials=startup,
                deterministic_objective=False,
                warn_independent_sampling=False,
            )
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
        case "nsga3":
            return optuna.samplers.NSGAIIISampler(seed=seed, population_size=population)
        case _:
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
