"""The Optuna study that is worked on: in memory, and behind it a database that has every trial.

Optuna reads all trials several times for one suggestion, and a database has to be asked each time for those that run.
The study has one writer (`study.ledger.lease`), so memory is never behind. A trial is written in one transaction when
it starts, and in a few when it ends, its state last.
"""

from __future__ import annotations

import copy
import json
import shlex
from collections import deque
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import optuna
import sqlalchemy as sa
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from study.config import StudyConfig
from study.ledger.sessions import make_sessions_table
from study.records import StudyPaths, sqlite_url
from trainables.errors import InputError, redacted

HISTORY = 500
"""Ended trials that a sampler learns from: the last ones, half as many with four objectives. TPE's time for a
suggestion grows with them and with their front."""


def open_storage(paths: StudyPaths, url: str | None, make: bool = True) -> optuna.storages.RDBStorage:
    """The study's database: SQLite in its folder unless a URL is given.

    Args:
        paths: of the study.
        url: of another database.
        make: its tables, where they do not exist.

    Raises:
        InputError: it cannot be reached or used, or was made by an Optuna with another schema.
    """
    try:
        if url is None:
            if make and not paths.database.exists():
                _make_database(paths.database.resolve())
            return optuna.storages.RDBStorage(
                sqlite_url(paths.database),
                engine_kwargs={"connect_args": {"timeout": 60}},
                skip_table_creation=not make,
            )
        return optuna.storages.RDBStorage(url, skip_table_creation=not make)
    except Exception as error:  # drivers, URLs and migrations raise what they like
        raise _unusable(paths, url, error) from None


def _make_database(path: Path) -> None:
    """Under another name first: SQLite keeps every statement at once, so a stop between the table of studies and its
    unique index would leave a database that takes the same study twice.
    """
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    engine = optuna.storages.RDBStorage(sqlite_url(part)).engine
    make_sessions_table(engine)
    engine.dispose()
    part.replace(path)


KEPT = ("recipe", "given", "replicate", "replicate_of")
"""User attributes that say what a trial is; the others say what came of it."""

OUTSIDE = "outside"
"""User attribute with the parameters of a trial that is no draw of the present space: samplers must not see them."""

EARLIER = "earlier"
"""User attribute of a trial that was begun again after it had ended: what came of it each time."""


def reopen(database: optuna.storages.RDBStorage, name: str, numbers: Sequence[int]) -> None:
    """Have ended trials run again under their numbers. Optuna itself never changes what has ended.

    Args:
        database: with the study.
        name: of the study.
        numbers: of its trials.
    """
    trials = database.get_all_trials(database.get_study_id_from_name(name))
    with database.engine.begin() as connection:
        for trial in (trials[number] for number in numbers):
            came = {"state": trial.state.name, "values": trial.values, "reason": trial.user_attrs.get("reason")}
            earlier = json.dumps([*trial.user_attrs.get(EARLIER, []), came])
            key, values, user, system = (
                table.trial_id == trial._trial_id
                for table in (
                    models.TrialModel,
                    models.TrialValueModel,
                    models.TrialUserAttributeModel,
                    models.TrialSystemAttributeModel,
                )
            )
            again = sa.update(models.TrialModel).where(key).values(state=TrialState.RUNNING, datetime_complete=None)
            connection.execute(again)
            connection.execute(sa.delete(models.TrialValueModel).where(values))
            outcome = models.TrialUserAttributeModel.key.not_in(KEPT)
            connection.execute(sa.delete(models.TrialUserAttributeModel).where(user, outcome))
            constraint = models.TrialSystemAttributeModel.key.like("constraints%")
            connection.execute(sa.delete(models.TrialSystemAttributeModel).where(system, constraint))
            row = {"trial_id": trial._trial_id, "key": EARLIER, "value_json": earlier}
            connection.execute(sa.insert(models.TrialUserAttributeModel).values(row))


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
        self._name = name
        self.prior: list[FrozenTrial] = []
        """Trials of other studies, with negative numbers: samplers see them, nobody else does."""
        self.attributes_changed = False
        """Whether a sampler has kept something new for the whole study."""
        self._open: list[int] = []
        self._ended: deque[int] = deque(maxlen=HISTORY // max(1, len(directions) - 2))
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

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """What samplers see: prior trials, those that wait or run, and the last that ended, see `HISTORY`."""
        everything = self.whole()
        trials = [everything[number] for number in sorted([*self._open, *self._ended])]
        trials = [trial for trial in trials if states is None or trial.state in states]
        trials = [trial for trial in self.prior if states is None or trial.state in states] + trials
        return copy.deepcopy(trials) if deepcopy else trials

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """As in memory."""
        number = super().create_new_trial(study_id, template_trial)
        (self._ended if self.get_trial(number).state.is_finished() else self._open).append(number)
        return number

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As in memory."""
        changed = super().set_trial_state_values(trial_id, state, values)
        if state.is_finished():
            self._open.remove(trial_id)
            self._ended.append(trial_id)
        return changed

    def whole(self) -> list[FrozenTrial]:
        """All trials, whatever samplers see."""
        return super().get_all_trials(self.get_study_id_from_name(self._name), deepcopy=False)

    def set_study_system_attr(self, study_id: int, key: str, value: optuna._typing.JSONSerializable) -> None:
        """Both at once: samplers keep here what must not begin again after a restart."""
        super().set_study_system_attr(study_id, key, value)
        self.attributes_changed = True
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
        for name in [name for name in now.params if name not in before.params]:  # in the order they were drawn
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


@contextmanager
def storage_as_input_errors(config: StudyConfig) -> Iterator[None]:
    """Turn a database that fails into one message, and leave alone what is wrong with anything else."""
    try:
        yield
    except (StorageInternalError, sa.exc.SQLAlchemyError) as error:
        raise _unusable(config.paths, config.storage, error) from None


def _unusable(paths: StudyPaths, url: str | None, error: Exception) -> InputError:
    where = redacted(url or str(paths.database))
    reason = (redacted(str(error.__cause__ or error)).splitlines() or [type(error).__name__])[0]
    if url and ":***@" in url:
        reason += "; its password is not kept: give --storage again, or leave it to ~/.pgpass"
    reason = reason.replace("$STORAGE_URL", shlex.quote(redacted(url or sqlite_url(paths.database))))
    return InputError(f"storage: the study's database {where} cannot be used: {reason}")
