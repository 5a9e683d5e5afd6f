"""When another attempt may start: when devices are held for it. Until then it has no process and costs nothing.

Ray is asked for the devices of the next attempts, which its autoscaler sees; how long that takes does not matter.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from study.execution.bad_nodes import left_out
from trainables.config import WorkersConfig
from trainables.execution.reserved import (
    able_nodes,
    demand,
    devices_on,
    give_back,
    held_on,
    node_id,
    reclaimed_nodes,
    reserve,
)

LOOK_SECONDS = 0.25
"""Between two looks at whether devices have come."""

SAID_AFTER_SECONDS = 10.0
"""Without any devices, it is said what is waited for."""

LOOKED_AT = 16
"""Of the devices that are asked for, so many at a look: they come about in the order in which they were asked for."""


@dataclass(frozen=True)
class Place:
    """Devices that are held for one attempt.

    Attributes:
        id: of Ray's placement group, in hex.
        nodes: see `trainables.results.Attempt`.
        kind: of device.
    """

    id: str = ""
    nodes: tuple[str, ...] = ()
    kind: str = ""


class Places(Protocol):
    """Where attempts find their devices."""

    def due(self) -> bool:
        """Whether it is time to look again."""

    def take(self, running: int, left: int) -> Place | None:
        """Devices for one more attempt, if they have come.

        Args:
            running: attempts that hold some.
            left: how many more could start.
        """

    def give_back(self, place: Place) -> None:
        """An attempt is over; what still runs there ends."""

    def leave_out(self, bad: Mapping[str, Sequence[str]]) -> None:
        """Nodes that are not used from now on, see `study.execution.bad_nodes`."""

    def elsewhere(self, nodes: Collection[str]) -> bool:
        """Whether an attempt could find a place without these nodes, by name."""

    def reclaimed(self) -> set[str]:
        """Ids of nodes that are being taken away, or were."""


class Anywhere:
    """Devices without end, for simulations."""

    def due(self) -> bool:
        """Always."""
        return True

    def take(self, running: int, left: int) -> Place | None:
        """At once."""
        return Place() if left else None

    def give_back(self, place: Place) -> None:
        """Nothing is held."""

    def leave_out(self, bad: Mapping[str, Sequence[str]]) -> None:
        """There are none."""

    def elsewhere(self, nodes: Collection[str]) -> bool:
        """Always."""
        return True

    def reclaimed(self) -> set[str]:
        """None are."""
        return set()


class Admission:
    """Keeps asking Ray for the devices of the next attempts.

    Where nobody says how many there can be, as many are asked for as run already and one more, so that a cluster which
    starts nodes on demand grows 1, 2, 4, ... as far as it can.

    Args:
        workers: of every attempt.
        most: attempts side by side; None: no limit.
        say: told once what is waited for, when there is nothing else.
        kind: what a kind of device is called, of what Ray found.
        grows_to: attempts that fit once the autoscaler has started all nodes that it may; None: nobody knows. No more
            is ever asked for, unless nodes join from elsewhere.
    """

    def __init__(
        self,
        workers: WorkersConfig,
        most: int | None,
        say: Callable[[str], None],
        kind: Callable[[str], str],
        grows_to: int | None = None,
    ) -> None:
        self._workers, self._most, self._say, self._kind = workers, most, say, kind
        self._grows_to = grows_to
        self._asked: list[Any] = []
        self._taken: dict[str, Any] = {}
        self._left_out: frozenset[str] = frozenset()
        self._next_look = 0.0
        self._waiting_since: float | None = None

    def due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() >= self._next_look

    def take(self, running: int, left: int) -> Place | None:
        """Devices for one more attempt, if they have come."""
        self._ask(wanted(running, left, self._limit()))
        found = self._first_held()
        end = time.monotonic() + LOOK_SECONDS
        while found is None and self._asked and not running and time.monotonic() < end:
            time.sleep(LOOK_SECONDS / 10)  # nothing else is to be done, and Ray Tune would sleep for a second
            found = self._first_held()
        if found is None:
            self._next_look = time.monotonic() + LOOK_SECONDS
            self._tell(running)
            return None
        self._waiting_since = None
        group, ids = found
        self._asked.remove(group)
        devices = devices_on(ids)
        place = Place(group.id.hex(), tuple(devices.nodes), self._kind(devices.kind))
        self._taken[place.id] = group
        return place

    def give_back(self, place: Place) -> None:
        """An attempt is over; what still runs there ends. Twice is as good as once."""
        if (group := self._taken.pop(place.id, None)) is not None:
            give_back(group)
        self._next_look = 0.0

    def leave_out(self, bad: Mapping[str, Sequence[str]]) -> None:
        """What was asked for is asked for again, elsewhere; said once of each node."""
        found = left_out(bad, [*able_nodes(self._workers)]) if bad else {}
        for node in found.keys() - self._left_out:
            self._say(f"left out from now on: {found[node]}")
        if found.keys() != self._left_out:
            self._left_out = frozenset(found)
            self._ask(0)

    def elsewhere(self, nodes: Collection[str]) -> bool:
        """Whether an attempt could find a place without these nodes, as the cluster is now."""
        without = self._left_out | {node_id(name) for name in nodes}
        able = able_nodes(self._workers).items()
        return sum(count for node, count in able if node not in without) >= self._workers.count

    def reclaimed(self) -> set[str]:
        """As Ray says."""
        return reclaimed_nodes()

    def close(self) -> None:
        """Give everything back."""
        self._ask(0)
        for group in self._taken.values():
            give_back(group)
        self._taken.clear()

    def _limit(self) -> int | None:
        if self._grows_to is None:
            return self._most
        now = sum(able_nodes(self._workers).values()) // self._workers.count
        return min(max(self._grows_to, now), self._most or sys.maxsize)

    def _ask(self, count: int) -> None:
        while len(self._asked) > count:
            give_back(self._asked.pop())
        while len(self._asked) < count:
            self._asked.append(reserve(self._workers, self._left_out))

    def _first_held(self) -> tuple[Any, list[str]] | None:
        for group in self._asked[:LOOKED_AT]:
            if (ids := held_on(group)) is not None:
                return group, ids
        return None

    def _tell(self, running: int) -> None:
        if running or not self._asked:
            self._waiting_since = None
            return
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since >= SAID_AFTER_SECONDS:
            self._waiting_since = float("inf")
            self._say(f"waiting for devices: {needed(self._workers)}")


def wanted(running: int, left: int, most: int | None) -> int:
    """For how many more attempts devices are asked for.

    Example:
        >>> [wanted(running, 100, None) for running in (0, 1, 3, 7)], wanted(3, 100, 4), wanted(3, 2, None)
        ([1, 2, 4, 8], 1, 2)
    """
    return max(0, min(left, running + 1 if most is None else most - running))


def at_once(most: int | None, grows_to: int | None) -> str:
    """How many trials run side by side, in words.

    Args:
        most: that are wanted; None: no limit.
        grows_to: see `Admission`.

    Example:
        >>> at_once(4, 8), at_once(None, None)
        ('4 at once', 'as many at once as the cluster holds')
        >>> at_once(16, 8)
        'up to 8 at once, on all nodes that the autoscaler may start: fewer than cluster.concurrency 16'
    """
    if grows_to is None or (most is not None and most <= grows_to):
        return "as many at once as the cluster holds" if most is None else f"{most} at once"
    fewer = "" if most is None else f": fewer than cluster.concurrency {most}"
    return f"up to {grows_to} at once, on all nodes that the autoscaler may start{fewer}"


def needed(workers: WorkersConfig) -> str:
    """What one attempt holds, in words.

    Example:
        >>> needed(WorkersConfig(count=2, cpus_per_worker=4, gpus_per_worker=1))
        '2 x {CPU: 3.2, GPU: 1}'
    """
    each = ", ".join(f"{name}: {amount:g}" for name, amount in demand(workers).items())
    return f"{workers.count} x {{{each}}}"
