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

from study.ledger import lease as module
from study.ledger.lease import EXPIRY_SECONDS, SESSIONS, Lease, sessions
from trainables.errors import InputError


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'study.db'}")
    yield engine
    engine.dispose()


def never() -> None:
    raise AssertionError("the lease was lost")


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
lease = Lease(sqlalchemy.create_engine("{engine.url}"), "s", lambda: None).__enter__()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert [row.open for row in sessions(engine, "s")] == [True]
    with Lease(engine, "s", never):
        first, second = sessions(engine, "s")
        assert first.ended == first.heartbeat
        assert second.open


def test_a_driver_elsewhere_is_followed_once_its_heart_has_stopped(engine: sa.Engine) -> None:
    with Lease(engine, "s", never):
        elsewhere(engine, process=1, process_started=0.0)
        with pytest.raises(InputError, match="process 1 on other"), Lease(engine, "s", never):
            pass
        elsewhere(engine, heartbeat=time.time() - EXPIRY_SECONDS - 1)
        with Lease(engine, "s", never):
            assert [row.host for row in sessions(engine, "s") if row.open] != ["other"]


def test_a_driver_that_slept_learns_that_it_lost_the_study(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
        with Lease(engine, "s", lost.set):
            elsewhere(engine, heartbeat=0.0)
            with engine.begin() as connection:
                connection.execute(sa.update(SESSIONS).values(ended=1.0))
            assert lost.wait(10)
    assert sessions(engine, "s")[0].ended == 1.0, "it does not write any more"


def test_a_locked_database_is_no_reason_to_give_up(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    impatient = sa.create_engine(engine.url, connect_args={"timeout": 0})
    with Lease(impatient, "s", never) as lease:
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


def test_time_is_added_up_over_sessions(engine: sa.Engine) -> None:
    for seconds in (10, 20):
        with Lease(engine, "s", never) as lease:
            lease.use("l4")
            last = sessions(engine, "s")[-1]
            with engine.begin() as connection:
                connection.execute(
                    sa.update(SESSIONS).where(SESSIONS.c.id == last.id).values(started=time.time() - seconds)
                )
            assert lease.last_device == "l4"
    assert sum(row.seconds() for row in sessions(engine, "s")) == pytest.approx(30, abs=2)
