"""A cloud on this machine: the autoscaler, as it is, starts and ends nodes here instead of renting machines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

ROOT = Path(__file__).parents[2]
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
"""Of a cluster file; nothing is to be done here."""

AUTOSCALER = "study.clusters.nodes.autoscaler"


class FakeCloud(FakeMultiNodeProvider):
    """What the autoscaler asks for nodes. Its part of the cluster file has `refused`, kinds without capacity;
    `boot_seconds`, which nodes take to come; and `log`, a file to which every request is added."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: dict[str, float], labels: dict[str, str]
    ) -> None:
        """Called by the autoscaler."""
        kind, given = tags[TAG_RAY_USER_NODE_TYPE], self.provider_config
        with open(given["log"], "a", encoding="utf-8") as log:
            log.write(json.dumps({"kind": kind, "refused": kind in given["refused"]}) + "\n")
        if kind in given["refused"]:  # as Ray's AWS provider does where no zone has capacity
            raise NodeLaunchException("InsufficientInstanceCapacity", "there is no capacity", None)
        time.sleep(given["boot_seconds"])
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)


class Cluster:
    """A head and its autoscaler.

    Attributes:
        address: of the head.
    """

    def __init__(self, head: Any, autoscaler: subprocess.Popen[bytes], log: Path) -> None:
        self._head, self._autoscaler, self._log = head, autoscaler, log
        self.address: str = head.address

    def requests(self) -> list[tuple[str, bool]]:
        """Kinds of nodes that the cloud was asked for, in order, and whether it refused."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [(line["kind"], line["refused"]) for line in map(json.loads, lines)]

    def workers(self) -> dict[str, dict[str, float]]:
        """Resources of the nodes that are there, by id, without the head."""
        nodes = [node for node in self._head.global_state.node_table() if node["Alive"]]
        return {node["NodeID"]: node["Resources"] for node in nodes if node["NodeID"] != FAKE_HEAD_NODE_ID}

    def lose(self, node: str) -> None:
        """A machine goes with all that runs on it."""
        for process in self.started():
            with suppress(psutil.Error):
                if any(node in argument for argument in process.cmdline()):
                    for child in [*process.children(recursive=True), process]:
                        with suppress(psutil.Error):
                            child.kill()

    def started(self) -> list[psutil.Process]:
        """What the autoscaler has started on this machine."""
        return list(psutil.Process(self._autoscaler.pid).children(recursive=True))


@contextmanager
def fake_cluster(
    folder: Path, kinds: Mapping[str, Mapping[str, Any]], *, nodes: int, **cloud: Any
) -> Iterator[Cluster]:
    """Args:
    folder: for its files.
    kinds: of workers, as in a cluster file.
    nodes: of all kinds together, at most.
    cloud: see `FakeCloud`.
    """
    from ray.cluster_utils import Cluster as RayCluster

    port, config, log = _free_port(), folder / "cluster.yaml", folder / "requests.jsonl"
    provider = {
        "type": "external",
        "module": f"{FakeCloud.__module__}.{FakeCloud.__name__}",
        "gcs_address": f"{get_node_ip_address()}:{port}",
        "launch_multiple": True,
        "disable_node_updaters": True,
        "log": str(log),
        "refused": [],
        "boot_seconds": 0,
    }
    head = {"CPU": 1, "trial_driver": 8}
    asked = {
        "cluster_name": "fake",
        "max_workers": nodes,
        "idle_timeout_minutes": 0.2,
        "provider": {**provider, **cloud},
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{what}_commands": [] for what in COMMANDS},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": head, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, **kind} for name, kind in kinds.items()},
        },
    }
    config.write_text(yaml.safe_dump(asked, sort_keys=False))
    given = {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
    }
    kept = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        made = RayCluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": head["CPU"],
                "resources": {"trial_driver": head["trial_driver"]},
                "gcs_server_port": port,
                "no_monitor": True,
                "include_dashboard": False,
                "env_vars": {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID},
            },
        )
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    environment = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "PYTHONPATH": str(ROOT)}
    flags = {"gcs-address": made.address, "autoscaling-config": config, "logs-dir": folder}
    autoscaler = subprocess.Popen(
        [sys.executable, "-m", AUTOSCALER, *(f"--{name}={value}" for name, value in flags.items())],
        env={**os.environ, **environment},
    )
    cluster = Cluster(made, autoscaler, log)
    try:
        yield cluster
    finally:
        started = cluster.started()
        for process in [*started, psutil.Process(autoscaler.pid)]:
            with suppress(psutil.Error):
                process.kill()
        autoscaler.wait()
        made.shutdown()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
