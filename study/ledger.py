"""The ledger: the only writer of the Optuna study, and through it of manifests.

What exists decides what happens next: `plan` is a pure function from (what the database says, which manifests exist) to
actions, so resuming is not a mode. An ended trial is first written as a manifest, then told to Optuna; a stop between
the two is mended by telling it again from the manifest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from search_spaces.recipes import recipe_point
from search_spaces.space import params_of, suggest
from study.config import StudyConfig
from study.pareto import measured
from study.records import Manifest, State, StudyPaths, TrialRecord, read_manifest, write_manifest
from trainables.config import Point, TrialConfig, content_hash
from trainables.trial import Outcome

optuna.logging.set_verbosity(optuna.logging.WARNING)

INFEASIBLE = "infeasible"
"""The constraint that an infeasible trial violates, and its user attribute with the reason."""


@dataclass(frozen=True)
class Plan:
    """What to do with the trials that exist.

    Attributes:
        tell: numbers of running trials whose manifest is there: they only have to be told.
        go_on: numbers of running trials without one: they were interrupted.
        fresh: how many searched trials are still to be asked for.
    """

    tell: list[int]
    go_on: list[int]
    fresh: int


def plan(records: Sequence[TrialRecord], with_manifest: set[str], budget: int) -> Plan:
    """Decide from what exists.

    Args:
        records: all trials of the database.
        with_manifest: keys of trials that have a manifest.
        budget: how many searched trials there shall be.
    """
    running = [record for record in records if record.state == "running"]
    searched = sum(record.recipe is None for record in records)
    return Plan(
        tell=[record.number for record in running if record.key in with_manifest],
        go_on=[record.number for record in running if record.key not in with_manifest],
        fresh=max(0, budget - searched),
    )


def open_storage(paths: StudyPaths, url: str | None, make: bool = True) -> optuna.storages.RDBStorage:
    """The study's database: SQLite in its folder unless a URL is given.

    Args:
        paths: of the study.
        url: of another database.
        make: its tables, where they do not exist.
    """
    if url is None:
        return optuna.storages.RDBStorage(
            f"sqlite:///{paths.database.resolve()}",
            engine_kwargs={"connect_args": {"timeout": 60}},
            skip_table_creation=not make,
        )
    return optuna.storages.RDBStorage(url, skip_table_creation=not make)


def read_records(name: str, storage: optuna.storages.RDBStorage) -> list[TrialRecord]:
    """All trials of a study, in order; changes nothing. None where the study was not begun yet."""
    try:
        return _records(optuna.load_study(study_name=name, storage=storage), name)
    except KeyError:
        return []


class Ledger:
    """Opens the study, or makes it with its recipes enqueued.

    Args:
        config: of the study.
        paths: its files.
        fingerprint: goes into every manifest.
    """

    def __init__(self, config: StudyConfig, paths: StudyPaths, fingerprint: str) -> None:
        self._config, self._paths, self._fingerprint = config, paths, fingerprint
        self._study = optuna.create_study(
            study_name=config.name,
            storage=open_storage(paths, config.storage),
            directions=[objective.direction for objective in config.objectives],
            load_if_exists=True,
        )
        self._study.sampler = RepeatableSampler(config)
        known = {record.recipe for record in self.records()}
        for recipe in config.recipes:
            if recipe not in known:
                params = params_of(config.space, self._recipe_point(recipe)) or {}
                self._study.enqueue_trial(params, user_attrs={"recipe": recipe})
        for number in self.plan().tell:
            manifest = read_manifest(paths.manifest(self.key(number)))
            if manifest is not None:
                self._tell(manifest)

    def key(self, number: int) -> str:
        """Stable name of a trial in every store."""
        return trial_key(self._config.name, number)

    def records(self) -> list[TrialRecord]:
        """All trials, in order."""
        return _records(self._study, self._config.name)

    def manifests(self) -> list[Manifest]:
        """All ended trials, in the order they ended."""
        found = (read_manifest(self._paths.manifest(record.key)) for record in self.records())
        return sorted((manifest for manifest in found if manifest), key=lambda manifest: manifest.ended)

    def plan(self) -> Plan:
        """What is left to do."""
        records = self.records()
        keys = {record.key for record in records if self._paths.manifest(record.key).exists()}
        return plan(records, keys, self._config.budget.trials)

    def take(self, number: int | None = None) -> TrialRecord:
        """The next trial, which is running from now on: recipes first, then what the sampler proposes.

        Args:
            number: an interrupted trial to go on with instead.
        """
        if number is None:
            trial = self._study.ask()
        else:
            trial = optuna.trial.Trial(self._study, self._study.trials[number]._trial_id)
        recipe = trial.user_attrs.get("recipe")
        if recipe is None or params_of(self._config.space, self._recipe_point(recipe)) is not None:
            suggest(
                self._config.space, trial
            )  # a recipe outside the space has no parameters the sampler could learn from
        return _record(self._study.trials[trial.number], self._config.name)

    def point(self, record: TrialRecord) -> Point:
        """What the trial trains with."""
        return self._recipe_point(record.recipe) if record.recipe else Point.model_validate(record.params)

    def finish(self, record: TrialRecord, outcome: Outcome, trial: TrialConfig) -> Manifest:
        """Account for an ended trial: manifest first, then Optuna. Twice is as good as once."""
        result = outcome.result
        fields: dict[str, Any] = {}
        if result is not None:
            fields = {
                "metrics": result.metrics,
                "cost": {
                    "device_seconds": result.device_seconds,
                    "seconds": result.seconds,
                    "steps": result.steps,
                    "resumed_from_steps": result.resumed_from_steps,
                    "final_temperature": result.temperature,
                },
                "versions": result.versions,
                "hashes": result.hashes,
                "correct": result.correct,
                "queries": result.queries,
            }
        manifest = Manifest(
            key=record.key,
            number=record.number,
            recipe=record.recipe,
            params=record.params,
            point=trial.point.model_dump(mode="json"),
            state=outcome.state,
            reason=outcome.reason,
            trace=outcome.trace,
            seeds={"study": self._config.seed, "trial": trial.seed, "protocol": self._config.protocol.seed},
            fingerprint=self._fingerprint,
            ended=time.time(),
            **fields,
        )
        manifest = write_manifest(self._paths.manifest(record.key), manifest)
        self._tell(manifest)
        return manifest

    def _tell(self, manifest: Manifest) -> None:
        frozen = self._study.trials[manifest.number]
        if frozen.state.is_finished():
            return
        if manifest.state == "complete":
            values = [measured(manifest, objective.metric).value for objective in self._config.objectives]
            self._study.tell(manifest.number, values)
            return
        trial = optuna.trial.Trial(self._study, frozen._trial_id)
        trial.set_user_attr("reason", manifest.reason)
        if manifest.state == "infeasible":
            trial.set_user_attr(INFEASIBLE, True)
            trial.set_constraint(INFEASIBLE, 1.0)
            self._study.tell(manifest.number, state=TrialState.PRUNED)
        else:
            self._study.tell(manifest.number, state=TrialState.FAIL)

    def _recipe_point(self, recipe: Any) -> Point:
        return recipe_point(recipe, self._config.protocol.epsilon, self._config.recipe_temperature)


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


def trial_key(study: str, number: int) -> str:
    """`<study>-t00042-s0`: number and replicate."""
    return f"{study}-t{number:05d}-s0"


def _records(study: optuna.Study, name: str) -> list[TrialRecord]:
    return [_record(frozen, name) for frozen in study.get_trials(deepcopy=False)]


def _record(frozen: optuna.trial.FrozenTrial, name: str) -> TrialRecord:
    return TrialRecord(
        number=frozen.number,
        key=trial_key(name, frozen.number),
        state=_state(frozen.state, frozen.user_attrs),
        params=dict(frozen.params),
        recipe=frozen.user_attrs.get("recipe"),
    )


def _state(state: TrialState, attributes: Mapping[str, Any]) -> State:
    if state == TrialState.PRUNED:
        return "infeasible"
    states: dict[TrialState, State] = {
        TrialState.WAITING: "waiting",
        TrialState.RUNNING: "running",
        TrialState.COMPLETE: "complete",
        TrialState.FAIL: "failed",
    }
    return states[state]
