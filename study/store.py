"""The Optuna study that is worked on: in memory, and behind it a database that has every trial.

Optuna reads all trials several times for one suggestion, and a database has to be asked each time for those that run.
The study has one writer (`study.run.driver_lock`), so memory is never behind. A trial is written in one transaction
when it starts, and in a few when it ends, its state last.
"""

from __future__ import annotations

import copy

import optuna
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial


class MirroredStorage(InMemoryStorage):
    """Holds one study in memory, where a trial's id is its number.

    Args:
        database: what the study is read from, and `save` writes to; None keeps it in memory only.
        name: of the study; it is made in the database if there is none.
        directions: of its objectives.
    """

    def __init__(self, database: BaseStorage | None, name: str, directions: list[StudyDirection]) -> None:
        super().__init__()
        self._database = database
        self._saved: list[FrozenTrial] = []
        study = self.create_new_study(directions, name)
        if database is None:
            return
        self._study = optuna.create_study(
            study_name=name, storage=database, directions=directions, load_if_exists=True
        )._study_id
        for key, value in database.get_study_system_attrs(self._study).items():
            super().set_study_system_attr(study, key, value)
        for trial in database.get_all_trials(self._study):
            self.create_new_trial(study, trial)
            self._saved.append(trial)

    def set_study_system_attr(self, study_id: int, key: str, value: optuna._typing.JSONSerializable) -> None:
        """Both at once: samplers keep here what must not begin again after a restart."""
        super().set_study_system_attr(study_id, key, value)
        if self._database is not None:
            self._database.set_study_system_attr(self._study, key, value)

    def save(self, number: int) -> None:
        """Write what is new of a trial to the database."""
        if self._database is None:
            return
        now = copy.deepcopy(self.get_trial(number))
        if number == len(self._saved):
            now._trial_id = self._database.create_new_trial(self._study, now)
            self._saved.append(now)
            return
        before = self._saved[number]
        now._trial_id = before._trial_id
        for name in now.params.keys() - before.params.keys():
            distribution = now.distributions[name]
            value = distribution.to_internal_repr(now.params[name])
            self._database.set_trial_param(now._trial_id, name, value, distribution)
        for key, value in now.user_attrs.items():
            if before.user_attrs.get(key) != value:
                self._database.set_trial_user_attr(now._trial_id, key, value)
        for key, value in now.system_attrs.items():
            if before.system_attrs.get(key) != value:
                self._database.set_trial_system_attr(now._trial_id, key, value)
        if now.state != before.state:
            self._database.set_trial_state_values(now._trial_id, now.state, now.values)
        self._saved[number] = now
