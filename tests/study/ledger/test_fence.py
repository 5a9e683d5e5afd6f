"""A driver that was stopped, and wakes when another has the study: it writes nothing more, and ends with 75."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from study import records
from study.config import StudyConfig
from study.ledger import journal
from study.ledger.lease import Lease, Pace, leave_at_once
from study.ledger.ledger import Ledger
from study.ledger.sessions import sessions
from study.ledger.store import open_storage
from study.records import Event
from tests.study.helpers import complete, forked, opened, study
from trainables.config import TrialConfig
from trainables.execution.signals import RESUMABLE

PACE = Pace(heartbeat=0.2, expiry=3.0, margin=1.0)
TRIALS = 2


def drive(config: StudyConfig, step: Callable[[str], None]) -> None:
    """Trials until the budget is used up; `step` is called before everything that is read or written."""
    storage = open_storage(config.paths, config.storage)
    with Lease(storage.engine, config.name, leave_at_once, PACE) as lease:
        ledger = Ledger(config, config.paths, "print", database=storage, confirm=lease.confirm)
        sa.event.listen(storage.engine, "before_cursor_execute", lambda *_: step("statement"))
        sa.event.listen(storage.engine, "commit", lambda _: step("commit"))
        append, link = records.append_event, os.link

        def logged(*given: Any) -> None:
            step("log")
            append(*given)

        def linked(*given: Any) -> None:
            step("manifest")
            link(*given)

        journal.append_event = logged
        os.link = linked
        todo = [*ledger.remaining().resume]
        while todo or (record := ledger.take_next()) is not None:
            if todo:
                record = ledger.take(todo.pop())
            for epoch in (1, 2):
                ledger.rung(record, epoch, epoch, {"clean/mr_r1": 0.1})
                ledger.journal.log(
                    record, Event(time=time.time(), event="rung", step=epoch, metrics={"clean/mr_r1": 0.1})
                )
            ledger.finish(record, complete(0.5, 0.01 * record.number), TrialConfig(key=record.key))


def start(config: StudyConfig, step: Callable[[str], None]) -> int:
    """A driver in a process of its own: its number."""
    return forked(lambda: drive(config, step))


def stopping_at(number: int) -> Callable[[str], None]:
    """Stop this process before its so-many-th step."""
    left = [number]

    def step(_: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    return step


def everything(config: StudyConfig) -> dict[str, Any]:
    """All rows of the database, and all files of the study."""
    engine = sa.create_engine(str(config.storage))
    tables = sa.MetaData()
    tables.reflect(engine)
    with engine.connect() as connection:
        rows = {name: sorted(map(repr, connection.execute(sa.select(t)))) for name, t in tables.tables.items()}
    engine.dispose()
    files = [path for path in config.paths.root.rglob("*") if path.is_file() and path.suffix != ".part"]
    return {**rows, **{str(path): path.read_bytes() for path in files}}


def exact(config: StudyConfig) -> None:
    """Every trial once, with the values of its manifest."""
    storage = open_storage(config.paths, config.storage)
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert [trial.number for trial in trials] == list(range(TRIALS + 2))
    assert [trial.values for trial in trials] == [[0.5, 0.01 * number] for number in range(TRIALS + 2)]
    assert len(list(config.paths.root.glob("trials/*/manifest.json"))) == TRIALS + 2
    assert not any(row.open for row in sessions(storage.engine, "s"))
    storage.engine.dispose()


def forget(url: str) -> None:
    """Empty the database."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("TRUNCATE trials, studies, paretovl_sessions CASCADE"))
    engine.dispose()


@pytest.mark.timeout(900)
def test_whenever_it_is_stopped(postgresql: str, tmp_path: Path, long_chaos: bool) -> None:
    config = study(tmp_path / "undisturbed", TRIALS, storage=postgresql, sampler="random")
    opened(config)._storage._database.engine.dispose()  # a fork must not share its connections
    assert os.waitpid(start(config, stopping_at(0)), 0)[1] == 0
    exact(config)
    moments = random.Random(5).sample(range(1, 100), 80 if long_chaos else 4)
    woken = 0
    for moment in moments:
        forget(postgresql)
        config = study(tmp_path / str(moment), TRIALS, storage=postgresql, sampler="random")
        opened(config)._storage._database.engine.dispose()  # a fork must not share its connections
        sleeper = start(config, stopping_at(moment))
        _, status = os.waitpid(sleeper, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            assert status == 0, moment  # it was done before
            continue
        time.sleep(PACE.expiry)
        assert os.waitpid(start(config, stopping_at(0)), 0)[1] == 0, moment
        exact(config)
        before = everything(config)
        os.kill(sleeper, signal.SIGCONT)
        _, status = os.waitpid(sleeper, 0)
        assert os.waitstatus_to_exitcode(status) == RESUMABLE, moment
        after = everything(config)
        moved = [name for name in before | after if before.get(name) != after.get(name)]
        # A line of a log that was under way when it fell asleep: it says what happened, and nothing is lost by it.
        assert all(name.endswith("events.jsonl") and after[name].startswith(before[name]) for name in moved), (
            moment,
            moved,
        )
        assert sum(after[name].count(b"\n") - before[name].count(b"\n") for name in moved) <= 1, moment
        woken += 1
    assert woken
