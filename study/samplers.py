"""Samplers by name: how searched points are proposed."""

from __future__ import annotations

import optuna

from study.config import StudyConfig


def make_sampler(config: StudyConfig, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler by name.

    Args:
        config: of the study.
        trials: how many there are already. It is part of the seed, so that a resumed study does not draw again what it
            drew first.
    """
    seed = config.seed * 1_000_003 + trials
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = min(10, 2 + config.budget.trials // 4)  # a small budget cannot spend ten trials on random points
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
