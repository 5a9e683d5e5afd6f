"""Ctrl-C and SIGTERM end a command in order, whenever they come."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)

RESUMABLE, INTERRUPTED = 75, 130
"""Exit codes: run the same command again, after anything but Ctrl-C; Ctrl-C."""

_received: list[int] = []
"""Signals of this process, kept here because Ray raises a `KeyboardInterrupt` of its own for any of them."""


def stopped_code() -> int:
    """The exit code after a `KeyboardInterrupt`: by the first signal that came."""
    return RESUMABLE if _received and _received[0] != signal.SIGINT else INTERRUPTED


def _stop(number: int, _: object = None) -> None:
    _received.append(number)
    raise KeyboardInterrupt


@contextmanager
def stopped_by_signals(message: str) -> Iterator[None]:
    """Within, signals raise `KeyboardInterrupt`; one that nobody catches ends the process with the message."""
    _received.clear()
    before = {number: signal.signal(number, _stop) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        print(message, file=sys.stderr)
        raise SystemExit(stopped_code()) from None
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
        _stop(seen[0])


def ignore_signals() -> None:
    """From here on, until `stopped_by_signals` ends: closing must not be cut short by a second one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
