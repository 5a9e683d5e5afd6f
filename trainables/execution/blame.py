"""Whose fault it was that an attempt ended without a result: decided from all ranks, and from their nodes."""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainables.execution.uploads import TRACE
from trainables.results import Cause

Kind = Literal["memory", "point", "preempted", "lost", "device", "storage", "bug", "collateral"]
"""Of one rank's failure, in the order in which one explains the others. A rank that ran out of memory or diverged says
so itself. One that is lost takes the others with it, whatever they say. An error of the program explains the broken
connections of its peers, which explain nothing."""

CAUSES: dict[Kind, Cause] = {
    "memory": "out_of_memory",
    "point": "point",
    "preempted": "preempted",
    "lost": "infrastructure",
    "device": "infrastructure",
    "storage": "infrastructure",
    "bug": "bug",
    "collateral": "infrastructure",
}

NAMED: dict[str, Kind] = {
    "Preempted": "preempted",
    "Diverged": "point",
    "TooLong": "point",
    "OutOfMemoryError": "memory",
    "MemoryError": "memory",
    "StorageAway": "storage",
}
"""Exceptions of a worker that say by their name what happened."""

SAID: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("memory", ("out of memory", "alloc_failed", "can't allocate memory", "cannot allocate memory")),
    ("bug", ("device-side assert",)),
    (
        "device",
        (
            *("uncorrectable ecc", "ecc error", "xid ", "no cuda-capable device", "cuda driver", "gpu is lost"),
            *("fallen off the bus", "unspecified launch failure", "cudaerrorlaunch", "cuda error: unknown error"),
            *("nvml", "hardware stack error", "devices unavailable", "busy or unavailable"),
        ),
    ),
    (
        "storage",
        (
            *("stale file handle", "no space left on device", "disk quota exceeded", "input/output error"),
            *("read-only file system", "transport endpoint is not connected", "aws error", "network_connection"),
        ),
    ),
    (
        "collateral",
        (
            *("nccl", "gloo", "connection closed by peer", "connection reset by peer", "broken pipe"),
            *("unhandled system error", "socket timeout", "collective operation", "process group", "tcpstore"),
            *("connection refused", "connection was closed", "heartbeat"),
        ),
    ),
)
"""Parts of messages, in lower case, and what they tell. The first that fits counts."""

STORAGE_CODES = {
    *(errno.ESTALE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTCONN),
    *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EREMOTEIO),
}
PEER_CODES = {errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ETIMEDOUT}


@dataclass(frozen=True)
class Blame:
    """What ended an attempt.

    Attributes:
        cause: of the end.
        reason: type and message of the failure that explains the others.
        rank: whose failure that is.
        trace: where the trial's own code failed.
    """

    cause: Cause
    reason: str
    rank: int
    trace: str | None = None


def blame(failures: Mapping[int, Exception], nodes: Sequence[str] = (), reclaimed: Collection[str] = ()) -> Blame:
    """Find the failure that explains the others.

    Args:
        failures: by rank, as Ray Train collects them; not all ranks need to have failed.
        nodes: of the workers by rank, as far as known.
        reclaimed: nodes that are being taken away, or were.
    """
    kinds = {rank: kind_of(failure, _at(nodes, rank) in reclaimed) for rank, failure in failures.items()}
    kind = next(kind for kind in CAUSES if kind in kinds.values())
    rank = min(rank for rank, found in kinds.items() if found == kind)
    if kind in ("lost", "device", "storage", "collateral") and any(node in reclaimed for node in nodes):
        return Blame("preempted", told(failures[rank]), rank)
    return Blame(CAUSES[kind], told(failures[rank]), rank, getattr(failures[rank], TRACE, None))


def kind_of(failure: Exception, node_reclaimed: bool = False) -> Kind:
    """What one rank's failure is, by itself.

    Args:
        failure: what the worker raised, or what Ray says of it.
        node_reclaimed: whether the worker's node is being taken away.
    """
    if _of_ray(failure):
        return "preempted" if node_reclaimed or _preempted(failure) else "lost"
    if (named := NAMED.get(type(failure).__name__)) is not None:
        return named
    code = failure.errno if isinstance(failure, OSError) else None
    if code in STORAGE_CODES:
        return "storage"
    if code == errno.ENOMEM:
        return "memory"
    text = f"{type(failure).__name__}: {failure}".lower()
    for kind, parts in SAID:
        if any(part in text for part in parts):
            return kind
    if code in PEER_CODES or isinstance(failure, ConnectionError | TimeoutError):
        return "collateral"
    name = type(failure).__name__
    return "collateral" if name.startswith("Dist") or name.endswith("CollectiveTimeoutError") else "bug"


def told(failure: Exception) -> str:
    """Type and message; of Ray's long messages the last line, without what it says of workers in general."""
    if not _of_ray(failure):
        return f"{type(failure).__name__}: {failure}"
    inner = getattr(failure, "health_check_failure", failure)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return f"{type(inner).__name__}: {last.partition(' Some common causes include')[0]}"


def _of_ray(failure: Exception) -> bool:
    """Whether Ray says it of the worker, which itself raised nothing."""
    mine = type(failure)
    return mine.__name__.startswith("WorkerHealthCheck") or any(
        one.__module__ == "ray.exceptions" for one in mine.__mro__
    )


def _preempted(failure: Exception) -> bool:
    return bool(getattr(getattr(failure, "health_check_failure", failure), "preempted", False))


def _at(nodes: Sequence[str], rank: int) -> str | None:
    return nodes[rank] if rank < len(nodes) else None
