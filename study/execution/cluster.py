"""The Ray cluster of a session, as its head answers: whether it is there, what it may grow to, and how it is left."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from trainables.config import WorkersConfig
from trainables.execution.reserved import fit


@dataclass(frozen=True)
class Growth:
    """What the autoscaler of a cluster makes it at most.

    Attributes:
        head: resources of the head.
        kinds: resources of a worker node, and how many of them there may be, by kind of node.
        nodes: worker nodes of all kinds together, at most.
    """

    head: Mapping[str, float]
    kinds: tuple[tuple[Mapping[str, float], int], ...]
    nodes: int

    def of(self, resource: str) -> float:
        """How much of it the nodes have at most; those of kinds with more of it are taken first."""
        return self.head.get(resource, 0) + self._most(lambda node: node.get(resource, 0))

    def side_by_side(self, workers: WorkersConfig) -> int:
        """Trials that fit at once on all nodes that there may be.

        Example:
            >>> gpus = Growth({"CPU": 8}, (({"CPU": 8, "GPU": 4}, 3), ({"CPU": 8, "GPU": 1}, 10)), nodes=5)
            >>> gpus.side_by_side(WorkersConfig(gpus_per_worker=1)), gpus.of("GPU")
            (14, 14)
        """
        return int(fit(self.head, workers) + self._most(lambda node: fit(node, workers))) // workers.count

    def _most(self, of: Callable[[Mapping[str, float]], float]) -> float:
        nodes = [of(node) for node, count in self.kinds for _ in range(min(count, self.nodes))]
        return sum(sorted(nodes, reverse=True)[: self.nodes])


def growth(address: str) -> Growth | None:
    """As the configuration of the autoscaler says that runs on this machine, the head; None where there is none.

    Ray has no call for it: its autoscaler tells nobody what it may start. So its process is looked for, by its flags.

    Args:
        address: of the cluster's head.
    """
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            flags = dict(flag.split("=", 1) for flag in process.cmdline() if flag.startswith("--") and "=" in flag)
            if flags.get("--gcs-address") == address and "--autoscaling-config" in flags:
                return growth_in(Path(flags["--autoscaling-config"]).expanduser())
    return None


def growth_in(path: Path) -> Growth | None:
    """What a file for Ray's autoscaler allows; None where it cannot be read, or does not say what its nodes have."""
    try:
        found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        kinds = dict(found["available_node_types"])
        head = kinds.pop(found["head_node_type"])
        if not head["resources"]:  # own machines are one kind, of which Ray says nothing
            return None
        most = int(found["max_workers"])
        each = tuple((dict(kind["resources"]), int(kind.get("max_workers", most))) for kind in kinds.values())
        return Growth(dict(head["resources"]), each, most)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def shut_down_ray() -> None:
    """End this process's part in Ray.

    Ray ends the process if one of its handles is freed while it shuts down. Tune leaves some in reference cycles, which
    any thread may collect at any time: so they are collected before, and none meanwhile.
    """
    import ray

    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def speaks_grpc(address: str, timeout_seconds: float) -> bool:
    """Whether a gRPC server answers there. Ray itself would wait for minutes to find out.

    Args:
        address: host:port.
        timeout_seconds: for connecting and for the answer.
    """
    host, _, port = address.rpartition(":")
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2 preface, empty SETTINGS
    try:
        with socket.create_connection((host, int(port)), timeout_seconds) as connection:
            connection.sendall(hello)
            answer = connection.recv(9)
    except (OSError, ValueError):
        return False
    return len(answer) >= 4 and answer[3] == 4  # a server begins with SETTINGS
