"""The ledger: the only writer of the Optuna study, and through it of manifests and logs.

What exists decides what happens next: `remaining` is a pure function from (what the database says, which manifests
exist) to actions, so resuming is not a mode. An ended trial is first written as a manifest, then told to Optuna; a stop
between the two is mended by telling it again from the manifest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from search_spaces.recipes import recipe_point
from search_spaces.space import params_of, suggest
from study.config import COST, COSTS, StudyConfig
from study.front.dominance import measured
from study.front.estimates import near_front
from study.ledger.asked import asked_of, keep_asked, keep_sampler, refuse_others_asked
from study.ledger.journal import Journal
from study.ledger.prior_studies import prior_trials
from study.ledger.remaining import Remaining, record_of, remaining
from study.ledger.rows import OUTSIDE, reopen
from study.ledger.sessions import sessions
from study.ledger.store import MirroredStorage, open_storage
from study.ledger.strays import marks, refuse_strays, replaced
from study.ledger.trials import replicate_key, trial_of
from study.paths import StudyPaths
from study.records import (
    INFEASIBLE,
    Ended,
    Manifest,
    TrialRecord,
    accounted,
    left_on_disk,
    read_manifests,
    study_id,
    write_atomically,
    write_manifest,
)
from study.search.rungs import is_rung, violation
from study.search.samplers import make_sampler
from trainables.config import Point, TrialConfig
from trainables.results import Outcome

optuna.logging.set_verbosity(optuna.logging.WARNING)


def read_records(name: str, storage: optuna.storages.RDBStorage) -> list[TrialRecord]:
    """All trials of a study, in order; changes nothing. None where the study was not begun yet."""
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return []
    return [record_of(trial, name) for trial in study.get_trials(deepcopy=False)]


class Ledger:
    """Opens the study, or makes it with its recipes enqueued.

    Args:
        config: of the study.
        paths: its files; None writes nothing anywhere, for simulations.
        fingerprint: goes into every manifest.
        clock: the time, in seconds.
        sampler: how points are proposed; None: as the configuration says.
        database: of the study; None: opened here.
        confirm: returns only while this process may write to the study's folder.

    Attributes:
        journal: the logs of its trials.
    """

    def __init__(
        self,
        config: StudyConfig,
        paths: StudyPaths | None,
        fingerprint: str,
        clock: Callable[[], float] = time.time,
        sampler: optuna.samplers.BaseSampler | None = None,
        database: optuna.storages.RDBStorage | None = None,
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._paths, self._fingerprint, self._clock = config, paths, fingerprint, clock
        self._id = study_id(paths) if paths else None
        self._confirm = confirm
        if database is None and paths:
            database = open_storage(paths, config.storage)
        directions = [StudyDirection[objective.direction.upper()] for objective in config.objectives]
        self._storage = MirroredStorage(database, config.name, directions)
        existing = [record_of(trial, config.name) for trial in self._storage.whole()]
        manifests = read_manifests(paths, existing) if paths else []
        if paths:
            refuse_strays(config, left_on_disk(paths), existing, manifests, {fingerprint, *marks(paths)})
            refuse_others_asked(config, self._id, existing, {manifest.key for manifest in manifests})
        self.reopened = [
            before.key for before, now in zip(existing, accounted(existing, manifests), strict=True) if before != now
        ]
        """Trials that had ended, and are to be done again because their account is gone."""
        if database is not None and self.reopened:
            reopen(database, config.name, [record.number for record in existing if record.key in self.reopened])
            self._storage = MirroredStorage(database, config.name, directions)
            existing = [record_of(trial, config.name) for trial in self._storage.whole()]
        self._study = optuna.load_study(study_name=config.name, storage=self._storage)
        self._study.sampler = sampler or make_sampler(config, len(existing))
        self._storage.prior = prior_trials(config) if paths else []
        known = {record.recipe for record in existing}
        for recipe in config.recipes:
            if recipe not in known:
                params = params_of(config.space, self._recipe_point(recipe)) or {}
                self._study.enqueue_trial(params, user_attrs={"recipe": recipe})
        given = [trial.user_attrs.get("given") for trial in self._storage.whole()]
        for point in config.points:
            if point not in given:
                self._study.enqueue_trial(point, user_attrs={"given": point})
        self._all = [record_of(trial, config.name) for trial in self._storage.whole()]
        if paths:
            keep_asked(paths, self._id, list(zip(existing, self._storage.whole(), strict=False)))
            keep_sampler(paths, self._storage)
        for record in self._all[len(existing) :]:
            self._save(record.number)
        self._waiting = sum(record.state == "waiting" for record in self._all)
        self._running = sum(record.state == "running" for record in self._all)
        self._searched = sum(record.searched for record in self._all)
        self._manifests = {manifest.key: manifest for manifest in manifests}
        self.journal = Journal(config, paths, clock, confirm)
        if paths and database is not None:
            self.journal.read(self._all, manifests, sessions(database.engine, config.name))
            for record in self._all:
                self._show_rungs(record.number, record.key)
        for number in self.remaining().tell:
            self._tell(self._manifests[self._all[number].key])
        self._plan_replicates()

    def records(self) -> list[TrialRecord]:
        """All trials, in order."""
        return list(self._all)

    def manifests(self) -> list[Manifest]:
        """All ended trials, in the order they ended."""
        return list(self._manifests.values())

    def planned(self) -> int:
        """Trials that there shall be, see `study.costs.budget.planned_trials`."""
        return len(self._all) - self._searched + max(self._searched, self._config.budget.trials)

    def remaining(self) -> Remaining:
        """What is left to do."""
        return remaining(self._all, self._manifests.keys(), self._config.budget.trials)

    def take_next(self) -> TrialRecord | None:
        """The next trial, running from now on: recipes first, then what the sampler proposes; None at the end."""
        return self.take() if self.left() else None

    def left(self) -> int:
        """How many trials there are to take."""
        return self._waiting + max(0, self._config.budget.trials - self._searched)

    def _plan_replicates(self) -> None:
        """Once all is done, enqueue further runs of the trials that may be on the front."""
        if not self._config.replicates or self._waiting or self._searched < self._config.budget.trials:
            return
        if self._running:
            return
        known = {record.key for record in self._all}
        members = near_front(self.manifests(), self._config.objectives, self._config.protocol.confidence)
        for first in (record for record in self._all if record.key in members):
            for replicate in range(1, self._config.replicates + 1):
                if replicate_key(first.key, replicate) in known:
                    continue
                attributes = {"recipe": first.recipe, "replicate": replicate, "replicate_of": first.number}
                self._study.enqueue_trial(first.params, user_attrs=attributes)
                self._save(len(self._all))
                self._all.append(record_of(self._storage.get_trial(len(self._all)), self._config.name))
                self._waiting += 1

    def take(self, number: int | None = None) -> TrialRecord:
        """A trial that is running from now on: the next one, whatever the budget, or an interrupted one.

        Args:
            number: of an interrupted trial.
        """
        trial = self._study.ask() if number is None else optuna.trial.Trial(self._study, number)
        if number is None:
            self._draw(trial)
        self._save(trial.number)
        return self._update(trial.number)

    def _draw(self, trial: optuna.Trial) -> None:
        """What is not given of its point. An interrupted trial has all of it, whatever the space is now."""
        recipe, first = trial.user_attrs.get("recipe"), trial.user_attrs.get("replicate_of", trial.number)
        outside = self._storage.get_trial(first).user_attrs.get(OUTSIDE)
        if outside is not None:
            trial.set_user_attr(OUTSIDE, outside)
        elif recipe is None or params_of(self._config.space, self._recipe_point(recipe)) is not None:
            suggest(self._config.space, trial)  # a recipe outside has no parameters the sampler could learn from

    def trial(self, template: TrialConfig, record: TrialRecord) -> TrialConfig:
        """The configuration that runs the trial."""
        return trial_of(self._config, template, record)

    def rung(self, record: TrialRecord, step: int, epoch: int, metrics: Mapping[str, float]) -> str | None:
        """Enter a small evaluation.

        Args:
            record: the trial.
            step: optimiser step.
            epoch: epochs done.
            metrics: what was measured, with the costs so far.

        Returns:
            Why the trial must stop here, or None if it goes on. Recipes and replicates always go on. What is known
            already was judged then.
        """
        if self.journal.logged(record, step):
            return self.journal.verdict(record)
        self.journal.rungs.add(record.key, step, metrics)
        self._show_rungs(record.number, record.key)
        stopping = self._config.early_stopping
        if not record.searched or not is_rung(epoch, stopping.first_epoch, stopping.eta):
            return None
        return self.journal.rungs.stop_reason(record.key, step)

    def _show_rungs(self, number: int, key: str) -> None:
        """To the sampler while the trial runs; the database has them when it has ended."""
        searched = [objective.metric for objective in self._config.objectives]
        rungs = {str(step): [row.get(name) for name in searched] for step, row in self.journal.rungs.of(key).items()}
        if rungs and self._all[number].state == "running":
            optuna.trial.Trial(self._study, number).set_user_attr("rungs", rungs)

    def in_touch(self) -> bool:
        """Whether the database is there; without it no trial starts, and those that end have manifests until it is."""
        return self._storage.in_touch()

    def settle(self) -> None:
        """See that the database has everything."""
        self._storage.settle()

    def finish(self, record: TrialRecord, outcome: Outcome, trial: TrialConfig) -> Manifest:
        """Account for an ended trial: manifest first, then Optuna. Twice is as good as once."""
        result = outcome.result
        if outcome.state != "failed" and (changed := self._replaced(record, result.hashes if result else {})):
            outcome, result = Outcome(state="failed", reason=changed), None
        self.journal.close(record, outcome.state)
        if result is None:
            return self._end(
                record, trial, outcome.state, outcome.reason, trace=outcome.trace, cost=self.journal.cost_so_far(record)
            )
        costs = {metric: getattr(result, field) for metric, field in COSTS.items()}
        if (held := self.journal.device_seconds(record)) is not None:
            costs[COST] = held
        fields: dict[str, Any] = {
            "metrics": result.metrics,
            "split": result.split,
            "cost": {
                **{COSTS[metric]: value for metric, value in costs.items()},
                "seconds": result.seconds,
                "moved_bytes": result.moved_bytes,
                "steps": result.steps,
                "resumed_from_steps": result.resumed_from_steps,
                "passed_over": result.passed_over,
                "final_temperature": result.temperature,
            },
            "versions": result.versions,
            "hashes": result.hashes,
            "correct": result.correct,
            "queries": result.queries,
            "captions_per_image": result.captions_per_image,
            "untouched": result.untouched,
        }
        values = {name: metric.value for name, metric in result.metrics.items()}
        values |= {metric: value for metric, value in costs.items() if value is not None}
        broken = [str(constraint) for constraint in self._config.constraints if violation([constraint], values) > 0]
        if outcome.state == "complete" and broken:
            return self._end(record, trial, "infeasible", f"does not keep {', '.join(broken)}", **fields)
        return self._end(record, trial, outcome.state, outcome.reason, **fields)

    def stop(self, record: TrialRecord, reason: str, trial: TrialConfig) -> Manifest:
        """Account for a trial that was stopped early. It has rungs, and no measurements."""
        changed = self._replaced(record, {})
        state: Ended = "failed" if changed else "stopped"
        self.journal.close(record, state)
        return self._end(record, trial, state, changed or reason, cost=self.journal.cost_so_far(record))

    def _replaced(self, record: TrialRecord, hashes: Mapping[str, str]) -> str | None:
        """Why the trial is not to be compared with those before it: what it was made from was replaced meanwhile."""
        known = hashes or self.journal.hashes(record)
        other = replaced(known, self._manifests.values(), self._fingerprint) if known else []
        if not other:
            return None
        changed = f"{', '.join(other)}: replaced while the study ran, so this is not comparable with other trials"
        return f"{changed}; put back what was there, then --rerun {record.key}"

    def _end(
        self, record: TrialRecord, trial: TrialConfig, state: Ended, reason: str | None, **fields: Any
    ) -> Manifest:
        manifest = Manifest(
            study=self._id,
            key=record.key,
            number=record.number,
            recipe=record.recipe,
            replicate=record.replicate,
            params=record.params,
            point=trial.point.model_dump(mode="json"),
            state=state,
            reason=reason,
            rungs={step: dict(metrics) for step, metrics in self.journal.rungs.of(record.key).items()},
            attempts=self.journal.attempts(record),
            seeds={"study": self._config.seed, "trial": trial.seed, "protocol": self._config.protocol.seed},
            fingerprint=self._fingerprint,
            ended=self._clock(),
            **{"hashes": self.journal.hashes(record), **fields},
        )
        if self._paths is not None:
            self._confirm()
            manifest = write_manifest(self._paths.manifest(record.key), manifest)
        manifest = self._manifests.setdefault(record.key, manifest)
        self.journal.ended(manifest)
        self._tell(manifest)
        self._plan_replicates()
        return manifest

    def _tell(self, manifest: Manifest) -> None:
        number = manifest.number
        if self._all[number].state != "running":
            return
        trial = optuna.trial.Trial(self._study, number)
        if manifest.reason:
            trial.set_user_attr("reason", manifest.reason)
        self._show_rungs(number, manifest.key)
        values = [measured(manifest, objective.metric).value for objective in self._config.objectives]
        if manifest.state == "infeasible":
            trial.set_user_attr(INFEASIBLE, True)
        if manifest.metrics:
            for constraint in self._config.constraints:
                trial.set_constraint(str(constraint), constraint.excess(measured(manifest, constraint.metric).value))
            self._study.tell(number, values)
        elif manifest.state == "failed":
            self._study.tell(number, state=TrialState.FAIL)
        else:
            if manifest.state == "infeasible":
                trial.set_constraint(INFEASIBLE, 1.0)
            self._study.tell(number, state=TrialState.PRUNED)
        self._storage.save_soon(number)
        self._update(number)

    def _save(self, number: int) -> None:
        """To the database, and what was asked of the trial to its folder."""
        self._storage.save(number)
        trial = self._storage.get_trial(number)
        if self._paths is None or trial.state.is_finished():
            return
        record = record_of(trial, self._config.name)
        self._confirm()
        write_atomically(self._paths.asked(record.key), asked_of(self._id, record, trial).model_dump_json(indent=1))
        if self._storage.attributes_changed:
            keep_sampler(self._paths, self._storage)

    def _update(self, number: int) -> TrialRecord:
        record = record_of(self._storage.get_trial(number), self._config.name)
        if number == len(self._all):
            self._searched += 1
        else:
            self._waiting -= self._all[number].state == "waiting"
            self._running -= self._all[number].state == "running"
        self._running += record.state == "running"
        self._all[number : number + 1] = [record]
        return record

    def _recipe_point(self, recipe: Any) -> Point:
        return recipe_point(recipe, self._config.protocol.epsilon, self._config.recipe_temperature)
