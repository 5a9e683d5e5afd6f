"""Which driver has a study: one row a session in the study's own database, alive as long as its heart beats.

The lock file in the study's folder keeps a second driver of the same machine away, and dies with its process. This
keeps away one on another host, wherever the database is shared. A session that was killed leaves a row that nobody
ended: another takes over at once if the process is known to be gone, else `EXPIRY_SECONDS` after the last heartbeat.
The clocks of the hosts have to agree better than that.

The same rows say how long drivers have worked on the study.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import psutil
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from study.config import StudyConfig
from trainables.errors import InputError
from trainables.files import UrlPath

HEARTBEAT_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
"""After the last heartbeat: several beats may be lost to a database that is locked or away."""

SAME_START_SECONDS = 2.0
"""Two readings of a process's start differ by less, though the clock is corrected now and then."""

_log = logging.getLogger(__name__)

SESSIONS = sa.Table(
    "paretovl_sessions",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study", sa.String(512), nullable=False),
    sa.Column("host", sa.String(256), nullable=False),
    sa.Column("process", sa.Integer, nullable=False),
    sa.Column("process_started", sa.Float, nullable=False),
    sa.Column("device", sa.String(64), nullable=False),
    sa.Column("started", sa.Float, nullable=False),
    sa.Column("heartbeat", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
    # At most one that has not ended: the database itself decides between two drivers.
    sa.Index(
        "paretovl_one_driver",
        "study",
        unique=True,
        sqlite_where=sa.text("ended IS NULL"),
        postgresql_where=sa.text("ended IS NULL"),
    ),
)


@dataclass(frozen=True)
class SessionRow:
    """One driver's time with a study. Times are seconds since the epoch."""

    id: int
    study: str
    host: str
    process: int
    process_started: float
    device: str
    started: float
    heartbeat: float
    ended: float | None

    @property
    def open(self) -> bool:
        """Whether nobody has ended it yet; its driver may be gone all the same."""
        return self.ended is None

    def seconds(self, now: float | None = None) -> float:
        """Wall time it worked; `now` counts for an open one instead of its last heartbeat."""
        end = self.ended if self.ended is not None else self.heartbeat if now is None else max(now, self.heartbeat)
        return end - self.started

    def gone(self, now: float, host: str) -> bool:
        """Whether its driver is known not to work any more, as seen from `host`."""
        if now - self.heartbeat > EXPIRY_SECONDS:
            return True
        return self.host == host and abs(started_at(self.process) - self.process_started) > SAME_START_SECONDS


def started_at(process: int) -> float:
    """When a process of this machine was started; 0 where there is none. Tells it from a later one of its number."""
    try:
        return float(psutil.Process(process).create_time())
    except psutil.NoSuchProcess:
        return 0.0


def sessions(engine: sa.Engine, study: str) -> list[SessionRow]:
    """All sessions of a study, in order; changes nothing."""
    if not sa.inspect(engine).has_table(SESSIONS.name):
        return []
    with engine.connect() as connection:
        query = sa.select(SESSIONS).where(SESSIONS.c.study == study).order_by(SESSIONS.c.id)
        return [SessionRow(**row._mapping) for row in connection.execute(query)]


def make_sessions_table(engine: sa.Engine) -> None:
    """Make the table of sessions where it does not exist."""
    try:
        SESSIONS.metadata.create_all(engine)
    except DBAPIError:  # two drivers made it at the same moment: it is there now
        SESSIONS.metadata.create_all(engine)


class Lease:
    """Holds a study for this process while the context lasts.

    Args:
        engine: of the study's database.
        study: its name there.
        lost: called from another thread if someone else has taken the study over, because this process was asleep for
            too long. It must not write any more.

    Raises:
        InputError: on entry, another driver has it; says which.
    """

    def __init__(self, engine: sa.Engine, study: str, lost: Callable[[], None]) -> None:
        self._engine, self._study, self._lost = engine, study, lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        make_sessions_table(self._engine)
        now, host = time.time(), socket.gethostname()
        for row in sessions(self._engine, self._study):
            if row.open and row.gone(now, host):
                self._update(row.id, ended=row.heartbeat)
        try:
            with self._engine.begin() as connection:
                values = {
                    "study": self._study,
                    "host": host,
                    "process": os.getpid(),
                    "process_started": started_at(os.getpid()),
                    "device": "",
                    "started": now,
                    "heartbeat": now,
                }
                key = connection.execute(sa.insert(SESSIONS).values(values)).inserted_primary_key
        except IntegrityError:
            raise InputError(self._holder()) from None
        assert key is not None
        self._id = int(key[0])
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        traceback.clear_frames(trace)  # what was cut short in the middle of a query keeps the database locked
        self._ended.set()
        self._thread.join()
        now = time.time()
        try:
            self._update(self._id, heartbeat=now, ended=now)
        except SQLAlchemyError as failure:  # the study is safe; the next driver waits for the heartbeat to expire
            _log.warning("the session could not be ended in the database: %s", failure)

    def use(self, device: str) -> None:
        """Note which kind of device the session holds."""
        self._update(self._id, device=device)

    @property
    def last_device(self) -> str:
        """Kind of device that the last session held; `cpu` where there was none."""
        kinds = [row.device for row in sessions(self._engine, self._study) if row.device]
        return kinds[-1] if kinds else "cpu"

    def worked_seconds(self) -> float:
        """Wall time that drivers have worked on the study until now."""
        return sum(row.seconds(time.time()) for row in sessions(self._engine, self._study))

    def _holder(self) -> str:
        rows = [row for row in sessions(self._engine, self._study) if row.open]
        if not rows:
            return f"study {self._study!r} was just left by another driver; try again"
        row, now = rows[-1], time.time()
        wait = max(1.0, row.heartbeat + EXPIRY_SECONDS - now)
        return (
            f"study {self._study!r} is running in process {row.process} on {row.host}, which gave a "
            f"sign of life {now - row.heartbeat:.0f} s ago; wait for it, or use another --name. If that machine is "
            f"gone, try again in {wait:.0f} s"
        )

    def _beat_on(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                alive = self._update(self._id, heartbeat=time.time())
            except SQLAlchemyError as failure:
                _log.warning("no heartbeat: %s", failure)
                continue
            if not alive:
                self._lost()
                return

    def _update(self, row: int, **values: object) -> bool:
        """Change a session that has not ended; False if it has."""
        change = sa.update(SESSIONS).where(SESSIONS.c.id == row, SESSIONS.c.ended.is_(None)).values(values)
        with self._engine.begin() as connection:
            return connection.execute(change).rowcount == 1


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
