"""Work that nobody waits for: done by a thread, the newest of what was asked for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Asked = TypeVar("Asked")

RESTS = 4
"""Times the processor time that it took a thread rests: no more than a fifth of the interpreter is its."""

_log = logging.getLogger(__name__)


class Background(Generic[Asked]):
    """Does what is asked for in a thread. What is asked while it works replaces what waits.

    Args:
        name: of the thread.
        work: what it does; while the thread lives it is called by nobody else.
        interval_seconds: least time between two calls; more after a long one.
        retry_seconds: the same after a failure.

    Attributes:
        last_error: why the last call failed; None if it did not.
    """

    def __init__(
        self, name: str, work: Callable[[Asked], object], interval_seconds: float = 2.0, retry_seconds: float = 30.0
    ) -> None:
        self.last_error: str | None = None
        self._name, self._work = name, work
        self._interval_seconds, self._retry_seconds = interval_seconds, retry_seconds
        self._asked: list[Asked] = []
        self._wanted, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._go_on, name=name, daemon=True)
        self._thread.start()

    def request(self, asked: Asked) -> None:
        """Have this done soon; of several requests the newest may be the only one that is done."""
        self._asked = [asked]
        self._wanted.set()

    def finish(self, asked: Asked) -> None:
        """Stop the thread and do this last, in the caller's thread; a failure is left in `last_error`."""
        self._stopped.set()
        self._wanted.set()
        self._thread.join()
        self._do(asked)

    def _go_on(self) -> None:
        while True:
            self._wanted.wait()
            if self._stopped.is_set():
                return
            self._wanted.clear()
            began = time.thread_time()
            if self._do(self._asked[0]):
                self._stopped.wait(max(self._interval_seconds, RESTS * (time.thread_time() - began)))
            else:
                self._wanted.set()
                self._stopped.wait(self._retry_seconds)

    def _do(self, asked: Asked) -> bool:
        try:
            self._work(asked)
        except Exception as error:  # whatever it is, who asked goes on
            if self.last_error is None:
                _log.warning("%s: %s", self._name, error)
            self.last_error = str(error) or type(error).__name__
            return False
        self.last_error = None
        return True
