"""The Optuna study that is worked on: in memory, and behind it a database that has every trial.

Optuna reads all trials several times for one suggestion, and a database has to be asked each time for those that run.
The study has one writer (`study.ledger.lease`), so memory is never behind. A trial is written in one transaction when
it starts, and in one when it ends.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections import deque
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import optuna
import sqlalchemy as sa
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from study.config import StudyConfig
from study.ledger.retries import OPENING_SECONDS, database_reason, passes, persistently
from study.ledger.rows import write_trial
from study.ledger.sessions import make_sessions_table
from study.paths import StudyPaths, sqlite_url
from trainables.errors import Away, InputError, redacted

HISTORY = 500
"""Ended trials that a sampler learns from: the last ones, half as many with four objectives. TPE's time for a
suggestion grows with them and with their front."""


def open_storage(paths: StudyPaths, url: str | None, make: bool = True) -> RDBStorage:
    """The study's database: SQLite in its folder unless a URL is given.

    Args:
        paths: of the study.
        url: of another database.
        make: its tables, where they do not exist.

    Raises:
        Away: the study was begun, and its database cannot be reached now.
        InputError: it cannot be reached or used, or was made by an Optuna with another schema.
    """

    def connect() -> RDBStorage:
        if url is None and make and not paths.database.exists():
            _make_database(paths.database.resolve())
        options = {"timeout": 60} if url is None else _impatient(url)
        return RDBStorage(
            url or sqlite_url(paths.database),
            engine_kwargs={"pool_pre_ping": url is not None, "connect_args": options},
            skip_table_creation=not make,
        )

    try:
        return persistently(connect, OPENING_SECONDS)
    except Exception as error:  # drivers, URLs and migrations raise what they like
        kind = Away if passes(error) and paths.config.exists() else InputError
        raise kind(_unusable(paths, url, error)) from None


def _impatient(url: str) -> dict[str, int]:
    """Options with which libpq does not wait for minutes for a server that is gone; those of the URL count more."""
    if sa.make_url(url).get_driver_name() not in ("psycopg", "psycopg2"):
        return {}
    ours = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "tcp_user_timeout": 20_000}
    return {name: value for name, value in ours.items() if name not in sa.make_url(url).query}


def _make_database(path: Path) -> None:
    """Under another name first: SQLite keeps every statement at once, so a stop between the table of studies and its
    unique index would leave a database that takes the same study twice.
    """
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    engine = RDBStorage(sqlite_url(part)).engine
    make_sessions_table(engine)
    engine.dispose()
    part.replace(path)


class MirroredStorage(InMemoryStorage):
    """Holds one study in memory, where a trial's id is its number.

    Args:
        database: what the study is read from, and `save` writes to; None keeps it in memory only.
        name: of the study; it is made in the database if there is none.
        directions: of its objectives.
    """

    def __init__(self, database: RDBStorage | None, name: str, directions: list[StudyDirection]) -> None:
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
        self._due: set[int] = set()
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
            write = partial(self._database.set_study_system_attr, self._study, key, value)
            persistently(write)

    def save(self, number: int) -> None:
        """Write what is new of a trial to the database, even if that takes a while to come back."""
        self._due.add(number)
        self.settle()

    def settle(self) -> None:
        """Write what is due."""
        persistently(self._write_due)

    def save_soon(self, number: int) -> None:
        """The same for a trial whose account is safe elsewhere: with the next one, if the database is away."""
        self._due.add(number)
        self.in_touch()

    def in_touch(self) -> bool:
        """Whether the database is there. What it does not have yet is written."""
        try:
            self._write_due()
            if self._database is not None:
                with self._database.engine.connect() as connection:
                    connection.execute(sa.select(1))
        except (StorageInternalError, sa.exc.SQLAlchemyError) as error:
            if not passes(error):
                raise
            return False
        return True

    def _write_due(self) -> None:
        for number in sorted(self._due):
            if self._database is not None:
                now = copy.deepcopy(self.get_trial(number))
                before = self._saved[number] if number < len(self._saved) else None
                now._trial_id = write_trial(self._database.engine, self._study, before, now)
                self._saved[number : number + 1] = [now]
            self._due.remove(number)


@contextmanager
def storage_as_input_errors(config: StudyConfig) -> Iterator[None]:
    """Turn a database that fails into one message, and leave alone what is wrong with anything else.

    Raises:
        Away: it may come back.
        InputError: it will not by itself.
    """
    try:
        yield
    except (StorageInternalError, sa.exc.SQLAlchemyError) as error:
        kind = Away if passes(error) else InputError
        raise kind(_unusable(config.paths, config.storage, error)) from None


def _unusable(paths: StudyPaths, url: str | None, error: Exception) -> str:
    where, reason = redacted(url or str(paths.database)), database_reason(error)
    if url and re.search("password|authentication", reason, re.IGNORECASE):
        reason += "; passwords are not kept: give PARETOVL_STORAGE or --storage again, or leave it to ~/.pgpass"
    reason = reason.replace("$STORAGE_URL", shlex.quote(redacted(url or sqlite_url(paths.database))))
    return f"storage: the study's database {where} cannot be used: {reason}"
