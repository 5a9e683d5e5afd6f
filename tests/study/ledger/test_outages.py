"""A database that goes away and comes back: the study goes on, or ends in time; nothing is lost or doubled."""

from __future__ import annotations

import copy
import os
import random
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from search_spaces.joint import JOINT
from search_spaces.space import suggest
from study.config import StudyConfig
from study.execution.tune_searcher import LedgerSearcher
from study.ledger.lease import Lease, Pace, leave_at_once
from study.ledger.ledger import Ledger
from study.ledger.retries import passes, persistently
from study.ledger.rows import write_trial
from study.ledger.store import open_storage
from study.paths import StudyPaths
from tests.study.conftest import Server
from tests.study.helpers import complete, ended, forked, opened, study
from trainables.config import TrialConfig
from trainables.errors import InputError
from trainables.execution.signals import RESUMABLE
from trainables.execution.worker import Patience

TRIALS = 4
PACE = Pace(heartbeat=0.1, expiry=3.0, margin=1.5)


def drive(config: StudyConfig, storage: optuna.storages.RDBStorage, pace: Pace, seconds: float) -> None:
    """What a session does, two trials at a time, each of so many seconds."""
    with Lease(storage.engine, config.name, leave_at_once, pace) as lease:
        ledger = Ledger(config, config.paths, "print", database=storage, confirm=lease.confirm)

        def make(record: Any) -> TrialConfig:
            return TrialConfig(key=record.key)

        searcher = LedgerSearcher(ledger, make, Patience(), lambda: True, lambda *_: None)
        running: list[str] = []
        over = False
        while running or not over:
            name = str(time.monotonic_ns())
            suggestion = searcher.suggest(name) if len(running) < 2 and not over else None
            if isinstance(suggestion, dict):
                running.append(name)
                continue
            over = over or suggestion is not None
            time.sleep(seconds)
            if running:
                searcher.on_trial_complete(running.pop(0), ended(complete(0.5, 0.1)))
        ledger.settle()


def exact(config: StudyConfig) -> None:
    """Every trial once."""
    storage = open_storage(config.paths, config.storage)
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert [(trial.number, trial.state) for trial in trials] == [(n, TrialState.COMPLETE) for n in range(TRIALS + 2)]
    assert [trial.values for trial in trials] == [[0.5, 0.1]] * (TRIALS + 2)
    assert len(list(config.paths.root.glob("trials/*/manifest.json"))) == TRIALS + 2
    storage.engine.dispose()


@pytest.mark.timeout(300)
def test_the_server_restarts_in_the_middle(postgresql: str, postgresql_server: Server, tmp_path: Path) -> None:
    config = study(tmp_path, TRIALS, storage=postgresql, sampler="random")
    opened(config)._storage._database.engine.dispose()  # a fork must not share its connections
    draw, done = random.Random(1), threading.Event()

    def work() -> None:
        try:
            drive(config, open_storage(config.paths, postgresql), Pace(heartbeat=0.2), 0.2)
            done.set()
        except BaseException:
            traceback.print_exc()

    driver = threading.Thread(target=work)
    driver.start()
    restarts = 0
    while not list(tmp_path.rglob("manifest.json")):
        time.sleep(0.01)
    while driver.is_alive() and restarts < 3:
        time.sleep(draw.uniform(0.1, 0.6))
        postgresql_server.stop()
        time.sleep(draw.uniform(0.3, 1.0))
        postgresql_server.start()
        restarts += 1
    driver.join()
    assert done.is_set()
    assert restarts >= 2
    exact(config)


def started(config: StudyConfig) -> int:
    """A driver in a process of its own: its number."""
    return forked(lambda: drive(config, open_storage(config.paths, config.storage), PACE, 0.3))


def ended_on_disk(config: StudyConfig) -> int:
    return len(list(config.paths.root.glob("trials/*/manifest.json")))


@pytest.mark.timeout(300)
def test_a_server_that_stays_away_ends_the_driver_in_time(
    postgresql: str, postgresql_server: Server, tmp_path: Path
) -> None:
    """What ended meanwhile has manifests, from which the next run tells it."""
    config = study(tmp_path, TRIALS, storage=postgresql, sampler="random")
    opened(config)._storage._database.engine.dispose()  # a fork must not share its connections
    child = started(config)
    while not ended_on_disk(config):
        time.sleep(0.01)
    postgresql_server.stop()
    before, began = ended_on_disk(config), time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == RESUMABLE
    assert time.monotonic() - began < PACE.expiry
    assert ended_on_disk(config) > before
    postgresql_server.start()
    time.sleep(PACE.expiry)
    assert os.waitpid(started(config), 0)[1] == 0
    exact(config)


class Lost:
    """Answers to commits get lost after they were carried out."""

    def __init__(self, engine: sa.Engine, draw: random.Random) -> None:
        self.times, self._draw, self._commit = 0, draw, engine.dialect.do_commit
        self._error: Exception = psycopg.OperationalError("server closed the connection unexpectedly")
        if engine.dialect.name == "sqlite":
            self._error = engine.dialect.loaded_dbapi.OperationalError("database is locked")

    def commit(self, connection: Any) -> None:
        self._commit(connection)
        if self._draw.random() < 0.4:
            self.times += 1
            raise self._error


@pytest.mark.parametrize("where", ["sqlite", "postgresql"])
def test_a_lost_answer_doubles_nothing(where: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = request.getfixturevalue("postgresql") if where == "postgresql" else None
    config = study(tmp_path, TRIALS, storage=url, sampler="random")
    opened(config)._storage._database.engine.dispose()  # a fork must not share its connections
    storage = open_storage(config.paths, url)
    lost = Lost(storage.engine, random.Random(3))
    with Lease(storage.engine, "s", leave_at_once) as lease:
        ledger = Ledger(config, config.paths, "print", database=storage, confirm=lease.confirm)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage.engine.dialect, "do_commit", lost.commit)
            while (record := ledger.take_next()) is not None:
                ledger.finish(record, complete(0.5, 0.1), TrialConfig(key=record.key))
            ledger.settle()
    assert lost.times > 3
    exact(config)


@pytest.mark.parametrize("where", ["sqlite", "postgresql"])
def test_rows_are_as_optuna_writes_them(where: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Trials in every state, read by Optuna; another's of the same number is told from one's own written twice."""
    storage = open_storage(StudyPaths(tmp_path), request.getfixturevalue(where) if where == "postgresql" else None)
    made = optuna.create_study(study_name="s", storage=storage, directions=["maximize", "minimize"])
    memory = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=1))
    before = []
    for end in range(5):
        memory.enqueue_trial({}, user_attrs={"recipe": "fare"})
        trial = memory.ask()
        assert trial.number == end
        before.append(write_twice(storage, made._study_id, None, trial._get_latest_trial()))
        suggest(JOINT, trial)
        before[-1] = write_twice(storage, made._study_id, before[-1], trial._get_latest_trial())
        trial.set_user_attr("reason", {"a": [1, None]})
        trial.set_constraint("c", 0.5)
        if end < 4:
            state = {0: TrialState.COMPLETE, 1: TrialState.PRUNED, 2: TrialState.FAIL, 3: TrialState.COMPLETE}[end]
            values = [1.0, float("inf") if end else 2.0] if state == TrialState.COMPLETE else None
            memory.tell(trial, values, state=state)
        write_twice(storage, made._study_id, before[-1], memory.trials[end])
    memory.enqueue_trial({"epsilon": 0.0})
    write_twice(storage, made._study_id, None, memory.trials[-1])
    for stored, known in zip(made.trials, memory.trials, strict=True):
        known._trial_id = stored._trial_id
        assert stored == known
    other = memory.trials[1]
    other.user_attrs["recipe"] = "mat"
    with pytest.raises(InputError, match="has a trial 1 already that was not made here"):
        write_trial(storage.engine, made._study_id, None, other)


def write_twice(storage: optuna.storages.RDBStorage, study: int, before: Any, now: Any) -> Any:
    """As after a lost answer."""
    now = copy.deepcopy(now)
    for _ in range(2):
        now._trial_id = write_trial(storage.engine, study, before, now)
    return now


def test_what_passes_is_asked_again_and_what_does_not_is_told_at_once(postgresql: str, tmp_path: Path) -> None:
    def failing(url: str) -> Exception:
        with pytest.raises(sa.exc.OperationalError) as told:
            sa.create_engine(url).connect()
        return told.value

    assert passes(failing("postgresql+psycopg://me@127.0.0.1:1/x"))
    for url in (
        postgresql.replace("me:", "me:wrong"),
        postgresql + "_none",
        "postgresql+psycopg://me@no.such.host.invalid/x",
        f"sqlite:///{tmp_path}/no/such/folder/x.db",
    ):
        assert not passes(failing(url)), url
    tries = []

    def operation() -> None:
        tries.append(1)
        sa.create_engine("postgresql+psycopg://me@127.0.0.1:1/x").connect()

    with pytest.raises(sa.exc.OperationalError, match="refused"):
        persistently(operation, 0.5)
    assert len(tries) > 2
