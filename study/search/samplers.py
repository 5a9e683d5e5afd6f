"""Samplers by name: how searched points are proposed."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers._tpe import sampler as tpe
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc
from threadpoolctl import threadpool_limits

from study.config import StudyConfig
from study.search.gp_sampler import propose, read_trials
from study.search.unit_box import UnitBox
from trainables.config import content_hash

GP_TRIALS = 300
"""Of a study under `auto`; up to here a Gaussian process answers within a second; its time grows with the cube."""

GP_START = 3
"""Trials that a Gaussian process learns from at least."""

GP_CUBE = 8
"""Points of a Latin hypercube, which those before are of, one hypercube after the other."""


def reason(config: StudyConfig) -> str:
    """What to tell the user of the sampler that `auto` stands for; empty where one was named."""
    if config.sampler != "auto":
        return ""
    if config.budget.trials <= GP_TRIALS:
        return f"sampler auto: gp, because there are no more than {GP_TRIALS} trials"
    return f"sampler auto: gp for {GP_TRIALS} trials and tpe for the rest, where a Gaussian process would be slow"


def make_sampler(config: StudyConfig, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler by name.

    Args:
        config: of the study.
        trials: how many there are already. It is part of the seed of samplers that draw a whole point at once, so that
            a resumed study does not draw again what it drew first.
    """
    seed = int(content_hash({"seed": config.seed, "trials": trials})[:8], 16)  # Optuna takes 32 bits
    budget = config.budget.trials
    population = max(8, min(50, budget // 5))  # Optuna's 50 would be random search for most budgets
    match config.sampler:
        case "qmc":  # every session goes on in the one sequence of the study's seed
            return optuna.samplers.QMCSampler(seed=config.seed, scramble=True, warn_independent_sampling=False)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
        case "nsga3":
            return optuna.samplers.NSGAIIISampler(seed=seed, population_size=population)
        case "gp" | "auto":
            return HypervolumeSampler(config)
        case _:
            return RepeatableSampler(config)


class RepeatableSampler(optuna.samplers.BaseSampler):
    """TPE or random, drawing each parameter of each trial from a seed of its own.

    What is drawn then depends on the trials that exist, but not on when the driver was started, nor on whether it was
    killed in the middle of a draw: the study ends as if it had never been interrupted.
    """

    def __init__(self, config: StudyConfig) -> None:
        self._config = config
        # A small budget cannot spend ten trials on random points.
        self._tpe = _SplitOnce(n_startup_trials=min(10, 2 + config.budget.trials // 4))

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
        seed = int(content_hash(identity)[:8], 16)
        if self._config.sampler == "random":
            sampler = optuna.samplers.RandomSampler(seed=seed)
            return sampler.sample_independent(study, trial, param_name, param_distribution)
        self._tpe.seed(seed)
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)


class HypervolumeSampler(RepeatableSampler):
    """Most growth of the hypervolume, see `gp_sampler`; under `auto`, TPE goes on from there."""

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config)
        self._box = UnitBox(config.space)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All knobs, as they are drawn at once."""
        late = self._config.sampler == "auto" and trial.number >= GP_TRIALS
        return {} if late else self._box.distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A value for every knob: the best ones for those that the trial has already."""
        if not search_space:
            return {}
        given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        known = read_trials(others, self._box, self._config.objectives)
        if len(known.points) < GP_START:
            cube, place = divmod(trial.number, GP_CUBE)
            spread = qmc.LatinHypercube(self._box.size, rng=_rng(self._config.seed, cube), optimization="random-cd")
            return self._box.params(self._box.snapped(spread.random(GP_CUBE))[place])
        with threadpool_limits(1):  # of small matrices; several threads wait for each other where all cores are busy
            return self._box.params(propose(known, self._box, given, _rng(self._config.seed, trial.number)))


def _rng(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, number])


class _SplitOnce(optuna.samplers.TPESampler):
    """Optuna's TPE, which proposes the same and tells good trials from others once a trial, not once a parameter."""

    _number = -1

    def seed(self, seed: int) -> None:
        """What is drawn next is as by a sampler that was made with the seed."""
        self._rng.rng.seed(seed)
        self._random_sampler._rng.rng.seed(seed)

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._number != trial.number:
            states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)  # those that run count as bad
            others = [
                other for other in study.get_trials(deepcopy=False, states=states) if other.number != trial.number
            ]
            ended = sum(other.state != TrialState.RUNNING for other in others)
            gamma = tpe.default_gamma_multiobjective if study._is_multi_objective() else tpe.default_gamma
            self._halves = tpe._split_trials(study, others, gamma(ended))
            self._number = trial.number
        below, above = (
            self._build_parzen_estimator(study, search_space, half, handle_below=half is self._halves[0])
            for half in self._halves
        )
        drawn = below.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(drawn, self._compute_acquisition_func(drawn, below, above))
        return {name: distribution.to_external_repr(best[name]) for name, distribution in search_space.items()}

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: optuna.Study
    ) -> dict[str, Any]:
        ((name, distribution),) = search_space.items()
        params = (trial.params for trial in trials)
        return {name: np.array([distribution.to_internal_repr(given[name]) for given in params if name in given])}
