"""Ctrl-C and SIGTERM end a command in order, whenever they come."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)

RESUMABLE, INTERRUPTED = 75, 130
"""Exit codes: run the same command again, after anything but Ctrl-C; Ctrl-C."""


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = INTERRUPTED if number == signal.SIGINT else RESUMABLE


@contextmanager
def stopped_by_signals(message: str) -> Iterator[None]:
    """Within, a signal raises `Stopped`; what nobody catches ends the process with the message and its exit code."""

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except Stopped as stopped:
        print(message, file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that come meanwhile take effect at the end: Ray crashes if its start is cut short.

    Ray sets a handler of its own for SIGTERM, which exits; here that is one more way to be stopped.
    """
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in SIGNALS}
    try:
        yield
    except SystemExit:
        seen.append(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if seen:
        raise Stopped(seen[0])


def ignore_signals() -> None:
    """From here on, until `stopped_by_signals` ends: closing must not be cut short by a second one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
