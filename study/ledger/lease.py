"""Which driver has a study: the one whose session is open, and every write is held against that.

The lock file in the study's folder keeps a second driver of the same machine away, and dies with its process. This
keeps away one on another host, wherever the database is shared. A session that was killed leaves a row that nobody
ended: another takes over at once if the process is known to be gone, else `EXPIRY_SECONDS` after the last heartbeat.

A driver that was asleep for longer wakes with writes in its hands. So each transaction of its engine first reads its
own row and locks it against being taken over: the database itself refuses what comes too late.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from study.config import StudyConfig
from study.ledger.retries import database_reason, persistently
from study.ledger.sessions import (
    EXPIRY_SECONDS,
    SESSIONS,
    SessionRow,
    clock_of,
    make_sessions_table,
    now_of,
    sessions,
    started_at,
)
from trainables.errors import InputError
from trainables.execution.signals import RESUMABLE
from trainables.files import UrlPath

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Never set, and goes on while the machine sleeps."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """How long a driver and its database may be out of touch.

    Attributes:
        heartbeat: seconds between two.
        expiry: seconds after the last one until another driver may take over.
        margin: so many seconds earlier this one gives up.
    """

    heartbeat: float = 10.0
    expiry: float = EXPIRY_SECONDS
    margin: float = 15.0


class LeaseLost(RuntimeError):
    """Another driver has the study: nothing more may be written."""


class Lease:
    """Holds a study for this process while the context lasts.

    Args:
        engine: of the study's database. Its transactions hold only while the lease does.
        study: its name there.
        lost: called, from any thread, with the reason if this process must not write any more.
        pace: of the heartbeats.

    Raises:
        InputError: on entry, another driver has it; says which.
    """

    def __init__(self, engine: sa.Engine, study: str, lost: Callable[[str], None], pace: Pace | None = None) -> None:
        self._engine, self._study, self._lost, self._pace = engine, study, lost, pace or Pace()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat_on, self._watch)]
        self._id, self._renewed, self._earlier, self._asked = 0, 0.0, 0.0, False

    def __enter__(self) -> Lease:
        persistently(self._open)
        self._earlier = sum(row.seconds() for row in sessions(self._engine, self._study) if row.id != self._id)
        sa.event.listen(self._engine, "begin", self._fence)
        for thread in self._threads:
            thread.start()
        return self

    def _open(self) -> None:
        make_sessions_table(self._engine)
        now, host, self._began = now_of(self._engine), socket.gethostname(), _clock()
        for row in sessions(self._engine, self._study):
            if row.open and row.gone(now, host, self._pace.expiry):
                self._end_silent(row.id, row.heartbeat)
        who = {"host": host, "process": os.getpid(), "process_started": started_at(os.getpid())}
        times = {name: clock_of(self._engine) for name in ("started", "heartbeat")}
        again, self._asked = self._asked, True
        try:
            with self._engine.begin() as connection:
                values = {"study": self._study, "device": "", **who, **times}
                key = connection.execute(sa.insert(SESSIONS).values(values)).inserted_primary_key
                assert key is not None
                self._id = int(key[0])
        except IntegrityError:
            held = [row for row in sessions(self._engine, self._study) if row.open]
            if not (again and held and (held[0].host, held[0].process) == (host, os.getpid())):
                raise InputError(self._holder(held)) from None
            self._id = held[0].id  # the answer was lost
        self._renewed = self._began

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        traceback.clear_frames(trace)  # what was cut short in the middle of a query keeps the database locked
        self._ended.set()
        for thread in self._threads:
            thread.join(self._pace.margin)
        try:
            self._update(heartbeat=clock_of(self._engine), ended=clock_of(self._engine))
        except (SQLAlchemyError, LeaseLost) as failure:  # the study is safe; the next driver waits for the expiry
            _log.warning("the session could not be ended in the database: %s", database_reason(failure))
        finally:
            sa.event.remove(self._engine, "begin", self._fence)

    def confirm(self) -> None:
        """Return only if no other driver can have the study: before anything is written outside of the database."""
        if _clock() - self._renewed > self._pace.expiry - self._pace.margin:
            self._renew()

    def use(self, device: str) -> None:
        """Note which kind of device the session holds."""
        persistently(partial(self._update, device=device))

    @property
    def last_device(self) -> str:
        """Kind of device that the last session held; `cpu` where there was none."""
        kinds = [row.device for row in sessions(self._engine, self._study) if row.device]
        return kinds[-1] if kinds else "cpu"

    def worked_seconds(self) -> float:
        """Wall time that drivers have worked on the study until now."""
        return self._earlier + _clock() - self._began

    def _fence(self, connection: sa.Connection) -> None:
        """The first statements of every transaction: the lease is held, and will be until the transaction has ended.

        Taking over waits for the lock. It cannot wait for ever: PostgreSQL ends the transaction of one that fell
        asleep in the middle of it long before.
        """
        mine = sa.select(SESSIONS.c.ended).where(SESSIONS.c.id == self._id)
        if connection.dialect.name == "sqlite":
            dbapi = connection.connection.driver_connection
            assert dbapi is not None
            dbapi.isolation_level = None  # it would begin on its own, and only with the first write
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            patience = str(int(500 * self._pace.expiry))
            limit = sa.func.set_config("idle_in_transaction_session_timeout", patience, True)
            mine = mine.add_columns(limit).with_for_update(read=True, key_share=True)
        row = connection.execute(mine).one_or_none()
        if row is None or row.ended is not None:
            reason = "another driver has taken the study over, because this one was asleep for too long"
            self._lost(reason)
            raise LeaseLost(reason)

    def _end_silent(self, row: int, heartbeat: float) -> None:
        """End another's session, unless it gives a sign of life at this moment. Waits for its transactions."""
        silent = (SESSIONS.c.id == row, SESSIONS.c.ended.is_(None), SESSIONS.c.heartbeat == heartbeat)
        with self._engine.begin() as connection:
            connection.execute(sa.select(SESSIONS.c.id).where(*silent).with_for_update())
            connection.execute(sa.update(SESSIONS).where(*silent).values(ended=heartbeat))

    def _holder(self, rows: Sequence[SessionRow]) -> str:
        if not rows:
            return f"study {self._study!r} was just left by another driver; try again"
        row, now = rows[-1], now_of(self._engine)
        wait = max(1.0, row.heartbeat + self._pace.expiry - now)
        return (
            f"study {self._study!r} is running in process {row.process} on {row.host}, which gave a "
            f"sign of life {now - row.heartbeat:.0f} s ago; wait for it, or use another --name. If that machine is "
            f"gone, try again in {wait:.0f} s"
        )

    def _beat_on(self) -> None:
        pause, told = self._pace.heartbeat, ""
        while not self._ended.wait(pause):
            try:
                self._renew()
                pause, told = self._pace.heartbeat, ""
            except SQLAlchemyError as failure:
                if (why := database_reason(failure)) != told:
                    _log.warning("no heartbeat: %s", why)
                pause, told = self._pace.heartbeat / 10, why
            except LeaseLost:
                return

    def _watch(self) -> None:
        """Give up in time where the database cannot be reached. Sleep does not count: who wakes is told by the fence.

        In a thread of its own, as a heartbeat may hang for as long as the network likes.
        """
        tick = self._pace.margin / 10
        renewed, out_of_touch, before = self._renewed, 0.0, _clock()
        while not self._ended.wait(tick):
            now = _clock()
            out_of_touch = out_of_touch + min(now - before, 2 * tick) if self._renewed == renewed else 0.0
            renewed, before = self._renewed, now
            if out_of_touch > self._pace.expiry - self._pace.margin:
                self._lost(f"the study's database could not be reached for {out_of_touch:.0f} s")
                return

    def _renew(self) -> None:
        began = _clock()
        self._update(heartbeat=clock_of(self._engine))
        self._renewed = began

    def _update(self, **values: object) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.update(SESSIONS).where(SESSIONS.c.id == self._id).values(values))


def _clock() -> float:
    return time.clock_gettime(CLOCK)


def leave_at_once(reason: str) -> None:
    """End this process without another write: the study may be somebody else's now."""
    print(f"stopped: {reason}", file=sys.stderr, flush=True)
    os._exit(RESUMABLE)


@contextmanager
def driver_lock(config: StudyConfig) -> Iterator[None]:
    """Hold the study against a second driver; the lock dies with the process, however it dies.

    Raises:
        InputError: another driver has it.
    """
    if isinstance(config.paths.root, UrlPath):  # where there is no such lock; the lease does it alone
        yield
        return
    with config.paths.lock.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"study {config.name!r} is running in another process; wait for it, or use another --name"
            ) from None
        yield
