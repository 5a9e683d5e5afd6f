"""A worker that hangs cannot be interrupted from within: a thread beside it ends the whole process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

STUCK = 86
"""Exit code of a process that its watchdog ended."""

SLOWEST_EPOCHS = 5.0
"""A final evaluation takes longer than an epoch, but not by more than this."""


class Watchdog:
    """Ends the process if it is silent for `silent_seconds`, or for 5 of its slowest epochs if that is longer.

    A context manager around the work; `beat` is called after each epoch.

    Args:
        silent_seconds: longest silence; also before the first beat.
        end: what ends the process.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        silent_seconds: float,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._silent_seconds, self._end, self._clock = silent_seconds, end, clock
        self._slowest = 0.0
        self._last = clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def beat(self) -> None:
        """The work is alive."""
        now = self._clock()
        self._slowest = max(self._slowest, now - self._last)
        self._last = now

    @property
    def stuck(self) -> bool:
        """Whether it has been silent for too long."""
        return self._clock() - self._last > max(self._silent_seconds, SLOWEST_EPOCHS * self._slowest)

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self._silent_seconds / 10)):
            if self.stuck:
                self._end(STUCK)
                return
