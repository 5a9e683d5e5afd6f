"""Whose fault it was: from all ranks, whatever is heard first, and from the nodes."""

from __future__ import annotations

import errno
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.exceptions import OutOfMemoryError as HostOutOfMemory
from ray.train.v2._internal.exceptions import (
    BroadcastCollectiveTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from trainables.execution.blame import CAUSES, blame, kind_of
from trainables.execution.uploads import TRACE
from trainables.execution.worker import TooLong
from trainables.training.finetune import Diverged


class Preempted(Exception):
    """As the worker's: the name is what counts."""


def raised(error: Exception) -> Exception:
    """By a worker's own code, and sent to the controller."""
    setattr(error, TRACE, "Traceback ...")
    sent: Exception = pickle.loads(pickle.dumps(error))
    return sent


def taken_away() -> Exception:
    gone = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    failure = ActorDiedError(ActorDiedErrorContext(actor_id=b"x" * 16, node_death_info=gone))
    return WorkerHealthCheckFailedError("A worker health check failed.", failure)


KINDS: dict[str, list[Callable[[], Exception]]] = {
    "memory": [
        lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        lambda: raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        lambda: raised(RuntimeError("NCCL error: ... Cuda failure 2 'out of memory'")),
        lambda: raised(MemoryError()),
        lambda: raised(OSError(errno.ENOMEM, "in another language")),
        lambda: raised(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ...")),
    ],
    "point": [lambda: raised(Diverged("the loss became nan by step 3")), lambda: raised(TooLong("70 s by step 3"))],
    "preempted": [lambda: raised(Preempted("notice")), taken_away],
    "lost": [
        lambda: WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError()),
        lambda: WorkerHealthCheckTimeoutError("hanging for 60 s"),
        lambda: raised(ActorUnavailableError("away", b"x" * 16)),
        lambda: HostOutOfMemory("Task was killed due to the node running low on memory."),
    ],
    "device": [
        lambda: raised(RuntimeError("CUDA error: uncorrectable ECC error encountered")),
        lambda: raised(RuntimeError("NCCL error: unhandled cuda error, uncorrectable ECC error")),
        lambda: raised(RuntimeError("No CUDA GPUs are available: no CUDA-capable device is detected")),
        lambda: raised(RuntimeError("CUDA error: unspecified launch failure")),
    ],
    "storage": [
        lambda: raised(OSError(errno.EHOSTUNREACH, "in another language")),
        lambda: raised(OSError(errno.ESTALE, "Stale file handle", "/mnt/x")),
        lambda: raised(OSError(errno.EIO, "Input/output error")),
        lambda: raised(OSError(errno.ENOSPC, "No space left on device")),
        lambda: raised(OSError(errno.EDQUOT, "Disk quota exceeded")),
        lambda: raised(RuntimeError("PytorchStreamWriter failed: No space left on device")),
        lambda: raised(OSError("When completing multiple part upload: AWS Error NETWORK_CONNECTION during ...")),
    ],
    "bug": [
        lambda: raised(KeyError("x")),
        lambda: raised(RuntimeError("CUDA error: device-side assert triggered")),
        lambda: raised(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")),
    ],
    "collateral": [
        lambda: raised(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")),
        lambda: raised(torch.distributed.DistBackendError("NCCL error in: ... remote process exited")),
        lambda: raised(RuntimeError("NCCL WARN unhandled system error (run with NCCL_DEBUG=INFO)")),
        lambda: raised(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")),
        lambda: raised(TimeoutError("the other side")),
        lambda: raised(BroadcastCollectiveTimeoutError(1.0, [1], 1.0)),
    ],
}


def test_each_by_itself() -> None:
    found = {kind: {kind_of(make()) for make in makers} for kind, makers in KINDS.items()}
    assert found == {kind: {kind} for kind in CAUSES}
    assert kind_of(KINDS["lost"][0](), node_reclaimed=True) == "preempted"
    assert kind_of(KINDS["bug"][0](), node_reclaimed=True) == "bug"


EXPLAINS = ("memory", "point", "preempted", "lost", "device", "storage", "bug", "collateral")
"""Which kind explains those after it."""


def test_one_explains_the_others_whichever_rank_it_is() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        kinds = [draw.choice(list(KINDS)) for _ in range(draw.randint(1, 4))]
        ranks = draw.sample(range(8), len(kinds))
        failures = {rank: draw.choice(KINDS[kind])() for rank, kind in zip(ranks, kinds, strict=True)}
        found = blame(failures, [f"n{rank}" for rank in range(8)])
        first = min(kinds, key=EXPLAINS.index)
        assert found.cause == CAUSES[first], kinds
        assert found.rank == min(rank for rank, kind in zip(ranks, kinds, strict=True) if kind == first)
        assert (found.trace is not None) == hasattr(failures[found.rank], TRACE)


def test_what_a_rank_says_of_itself_stands_and_the_rest_goes_with_the_node() -> None:
    """Rank 1 is on a node that is taken away; the error of rank 0 came first, and alone."""
    for kind, makers in KINDS.items():
        own = kind in ("memory", "point", "bug")
        for make in makers:
            assert blame({0: make()}, ["a", "b"], {"b"}).cause == (CAUSES[kind] if own else "preempted"), kind
            assert blame({0: make()}, ["a", "b"], {"c"}).cause == CAUSES[kind]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (raised(KeyError("x")), "KeyError: 'x'"),
        (raised(Diverged("nan")), "Diverged: nan"),
        (KINDS["lost"][0](), "ActorDiedError: The actor died unexpectedly"),
        (
            HostOutOfMemory("Worker exits with code 2. End of file. Some common causes include: (1) killed, (2) else."),
            "OutOfMemoryError: Worker exits with code 2. End of file.",
        ),
    ],
)
def test_the_reason_begins_with_the_type(failure: Exception, reason: str) -> None:
    assert blame({3: failure}).reason.startswith(reason)
    assert "common causes" not in blame({3: failure}).reason
    assert blame({3: failure}).rank == 3
