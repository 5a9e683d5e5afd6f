"""A database that is away for a moment is asked again, with growing pauses."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa
from optuna.exceptions import StorageInternalError

from trainables.errors import redacted

Answer = TypeVar("Answer")

OPENING_SECONDS, PATIENCE_SECONDS = 5.0, 90.0
"""How long a database is asked: to be opened at all, and while a driver has its study there."""

LATER = re.compile(r"08...|40...|53...|55P03|57P0[123]|25P03")
"""PostgreSQL's codes: no connection, a conflict, no resources, a lock, the server ends or begins, this side slept."""
NEVER = re.compile(r"password|authentication|pg_hba|does not exist|resolve|translate|SSL|not known", re.IGNORECASE)
"""Why a connection is refused, where asking again does not help."""


def passes(error: BaseException | None) -> bool:
    """Whether the same may succeed a moment later; what Optuna has wrapped counts, too."""
    if isinstance(error, sa.exc.TimeoutError):  # no connection was free
        return True
    if not isinstance(error, sa.exc.DBAPIError):
        return error is not None and passes(error.__cause__)
    code, text = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None), str(error.orig)
    if code:
        return LATER.fullmatch(code) is not None
    if type(error.orig).__module__.startswith("sqlite3"):
        return "locked" in text or "busy" in text
    return error.connection_invalidated or (isinstance(error, sa.exc.OperationalError) and not NEVER.search(text))


def persistently(operation: Callable[[], Answer], seconds: float = PATIENCE_SECONDS) -> Answer:
    """Do what may be done twice, again and again while the database is away.

    Args:
        operation: one or more transactions; the answer to any of them may be lost after it was carried out.
        seconds: to go on trying.

    Raises:
        Exception: what it said last, after so long or where asking again does not help.
    """
    began, pause = time.monotonic(), 0.05
    while True:
        try:
            return operation()
        except (sa.exc.SQLAlchemyError, StorageInternalError) as error:
            if not passes(error) or time.monotonic() - began + pause > seconds:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def database_reason(error: BaseException) -> str:
    """What a database says is wrong, in one line and without passwords."""
    while error.__cause__ is not None and not isinstance(error, sa.exc.DBAPIError):
        error = error.__cause__
    said = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    return (redacted(str(said)).splitlines() or [type(error).__name__])[0]
