"""Sessions: one row for each driver's time with a study, in the study's own database.

Times are the database's own where it has a clock (PostgreSQL), so that those of the hosts need not agree.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

EXPIRY_SECONDS = 120.0
"""A driver that gave no sign of life for so long is held to be gone, and another may take over."""

SAME_START_SECONDS = 2.0
"""Two readings of a process's start differ by less, though the clock is corrected now and then."""

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

    def gone(self, now: float, host: str, expiry_seconds: float = EXPIRY_SECONDS) -> bool:
        """Whether its driver is known not to work any more, as seen from `host`."""
        if now - self.heartbeat > expiry_seconds:
            return True
        return self.host == host and abs(started_at(self.process) - self.process_started) > SAME_START_SECONDS


def started_at(process: int) -> float:
    """When a process of this machine was started; 0 where there is none. Tells it from a later one of its number."""
    try:
        return float(psutil.Process(process).create_time())
    except psutil.NoSuchProcess:
        return 0.0


def clock_of(engine: sa.Engine) -> sa.ColumnElement[float]:
    """The time as the database has it; SQLite is on this machine."""
    if engine.dialect.name == "postgresql":
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Float(53))
    return sa.literal(time.time(), sa.Float)


def now_of(engine: sa.Engine) -> float:
    """The time as the database has it."""
    with engine.connect() as connection:
        return float(connection.execute(sa.select(clock_of(engine))).scalar_one())


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
