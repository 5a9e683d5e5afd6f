"""A worker that hangs cannot be interrupted from within: a thread beside it ends the whole process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

STUCK = 86
"""Exit code of a process that its watchdog ended."""

FIRST_STEP = 5.0
"""Times as long a silence is borne before the first step: data and models are read, kernels are compiled."""


class Watchdog:
    """Ends the process if it is silent for `silent_seconds`, or for 5 times as long before its first step.

    A context manager around the work.

    Args:
        silent_seconds: longest silence.
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
        self._borne = FIRST_STEP * silent_seconds
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
        self._last = self._clock()

    def step(self) -> None:
        """A step is done."""
        self.beat()
        self._borne = self._silent_seconds

    @property
    def stuck(self) -> bool:
        """Whether it has been silent for too long."""
        return self._clock() - self._last > self._borne

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self._silent_seconds / 10)):
            if self.stuck:
                self._end(STUCK)
                return
