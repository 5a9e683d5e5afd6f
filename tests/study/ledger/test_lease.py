"""Two drivers never have one study, on one machine or two, and a dead driver does not keep it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from study.ledger.lease import Lease, LeaseLost, Pace
from study.ledger.sessions import EXPIRY_SECONDS, SESSIONS, sessions
from trainables.errors import InputError


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'study.db'}")
    yield engine
    engine.dispose()


def never(reason: str) -> None:
    raise AssertionError(reason)


def elsewhere(engine: sa.Engine, **values: object) -> None:
    """Make the only session one of a process on another host."""
    with engine.begin() as connection:
        connection.execute(sa.update(SESSIONS).values(host="other", **values))


def test_the_second_driver_is_refused_and_told_who_has_it(engine: sa.Engine) -> None:
    with Lease(engine, "s", never):
        with pytest.raises(InputError, match=rf"is running in process {os.getpid()} on "), Lease(engine, "s", never):
            pass
        with Lease(engine, "another study", never):
            pass
    with Lease(engine, "s", never):
        pass
    assert [row.open for row in sessions(engine, "s")] == [False, False]


def test_of_two_that_start_together_one_gets_it(engine: sa.Engine) -> None:
    SESSIONS.metadata.create_all(engine)
    got, refused, barrier, leave = [], [], threading.Barrier(4), threading.Event()

    def drive() -> None:
        barrier.wait()
        try:
            with Lease(engine, "s", never):
                got.append(1)
                leave.wait()
        except InputError:
            refused.append(1)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    end = time.time() + 20
    while len(got) + len(refused) < 4 and time.time() < end:
        time.sleep(0.01)
    leave.set()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 3)


def test_a_killed_driver_of_this_machine_is_followed_at_once(engine: sa.Engine, tmp_path: Path) -> None:
    script = f"""
import os, sqlalchemy
from study.ledger.lease import Lease
lease = Lease(sqlalchemy.create_engine("{engine.url}"), "s", print).__enter__()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert [row.open for row in sessions(engine, "s")] == [True]
    with Lease(engine, "s", never):
        first, second = sessions(engine, "s")
        assert first.ended == first.heartbeat
        assert second.open


def test_a_driver_elsewhere_is_followed_once_its_heart_has_stopped(engine: sa.Engine) -> None:
    lost: list[str] = []
    other = sa.create_engine(engine.url)
    with Lease(other, "s", lost.append):
        elsewhere(engine, process=1, process_started=0.0)
        with pytest.raises(InputError, match="process 1 on other"), Lease(engine, "s", never):
            pass
        elsewhere(engine, heartbeat=time.time() - EXPIRY_SECONDS - 1)
        with Lease(engine, "s", never):
            assert [row.host for row in sessions(engine, "s") if row.open] != ["other"]
    assert lost
    other.dispose()


def test_a_driver_that_slept_writes_nothing_and_learns_why(engine: sa.Engine) -> None:
    """Its transactions are refused by the database, whichever comes first after the study was taken over."""
    table = sa.Table("account", sa.MetaData(), sa.Column("row", sa.Integer))
    table.create(engine)
    lost: list[str] = []
    other = sa.create_engine(engine.url)
    with Lease(engine, "s", lost.append) as lease:
        with engine.begin() as connection:
            connection.execute(sa.insert(table).values(row=1))
        with other.begin() as connection:
            connection.execute(sa.update(SESSIONS).values(ended=1.0))
        with pytest.raises(LeaseLost), engine.begin() as connection:
            connection.execute(sa.insert(table).values(row=2))
        with pytest.raises(LeaseLost):
            lease.use("l4")
    assert "another driver has taken the study over" in lost[0]
    with other.connect() as connection:
        assert list(connection.execute(sa.select(table))) == [(1,)]
    assert sessions(other, "s")[0].ended == 1.0
    other.dispose()


def test_its_heart_beats_no_more_and_it_is_told_at_once(engine: sa.Engine) -> None:
    told = threading.Event()
    with Lease(engine, "s", lambda _: told.set(), Pace(heartbeat=0.05)):
        other = sa.create_engine(engine.url)
        with other.begin() as connection:
            connection.execute(sa.update(SESSIONS).values(ended=1.0))
        other.dispose()
        assert told.wait(10)


def test_one_that_gives_a_sign_of_life_is_not_taken_over(engine: sa.Engine) -> None:
    """It was read as silent, and its heart beat before its session was ended."""
    with Lease(engine, "s", never) as lease:
        before = sessions(engine, "s")[0]
        lease.use("l4")
        lease._renew()
        other = Lease(engine, "s", never)
        other._end_silent(before.id, before.heartbeat)
        assert sessions(engine, "s")[0].open


def test_a_locked_database_is_no_reason_to_give_up(engine: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    impatient = sa.create_engine(engine.url, connect_args={"timeout": 0})
    with Lease(impatient, "s", never, Pace(heartbeat=0.05)) as lease:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN EXCLUSIVE")
            time.sleep(0.3)
            connection.rollback()
        before = sessions(engine, "s")[0].heartbeat
        end = time.time() + 10
        while sessions(engine, "s")[0].heartbeat == before and time.time() < end:
            time.sleep(0.02)
        assert sessions(engine, "s")[0].heartbeat > before
        assert lease.worked_seconds() > 0
    assert caplog.messages == ["no heartbeat: database is locked"], "told once, not with every try"


def test_a_database_that_stays_away_ends_the_driver_before_the_lease_expires(engine: sa.Engine) -> None:
    impatient = sa.create_engine(engine.url, connect_args={"timeout": 0})
    told: list[float] = []
    pace = Pace(heartbeat=0.05, expiry=2.0, margin=1.0)
    with Lease(impatient, "s", lambda _: told.append(time.monotonic()), pace) as lease:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN EXCLUSIVE")
            locked = time.monotonic()
            while not told and time.monotonic() < locked + 20:
                time.sleep(0.02)
            with pytest.raises(sa.exc.OperationalError, match="locked"):
                lease.confirm()  # no file is written, either
            connection.rollback()
        assert told[0] - locked < pace.expiry
    assert not sessions(engine, "s")[0].open


def test_time_is_added_up_over_sessions(engine: sa.Engine) -> None:
    for seconds, before, device in ((10, 0, "l4"), (20, 10, "h100")):
        with Lease(engine, "s", never) as lease:
            assert lease.worked_seconds() == pytest.approx(before, abs=2)
            lease.use(device)
            last = sessions(engine, "s")[-1]
            with engine.begin() as connection:
                connection.execute(
                    sa.update(SESSIONS).where(SESSIONS.c.id == last.id).values(started=time.time() - seconds)
                )
            assert lease.last_device == device
    assert sum(row.seconds() for row in sessions(engine, "s")) == pytest.approx(30, abs=2)
