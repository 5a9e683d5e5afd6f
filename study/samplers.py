"""Samplers by name: how searched points are proposed."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from study.config import StudyConfig
from trainables.config import content_hash


class RepeatableSampler(optuna.samplers.BaseSampler):
    """Draws each parameter of each trial from a seed of its own.

    What is drawn then depends on the trials that exist, but not on when the driver was started, nor on whether it was
    killed in the middle of a draw: the study ends as if it had never been interrupted.
    """

    def __init__(self, config: StudyConfig) -> None:
        self._config = config

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """None: parameters are drawn one by one, as they depend on each other."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing, as there is no relative search space."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the configured sampler draws with the parameter's own seed."""
        identity = {"seed": self._config.seed, "trial": trial.number, "parameter": param_name}
        sampler = make_sampler(self._config, int(content_hash(identity)[:8], 16))
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def make_sampler(config: StudyConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler by name."""
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = min(10, 2 + config.budget.trials // 4)  # a small budget cannot spend ten trials on random points
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
