"""A cloud's notice, by way of the watcher of the node, and a node lost without one: what each costs a trial."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.test_cluster import POINTS, ended, open_attempt, under_way
from tests.chaos.test_kill_and_resume import CONFIG, Driver
from tests.chaos.test_real import victims, wait_for
from tests.metadata_server import MetadataServer

pytestmark = pytest.mark.chaos

AWS_SECONDS = 120
"""From the notice to the end."""

CLUSTER = """
import json, time
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

cluster = Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 1, "resources": {"trial_driver": 8}, "include_dashboard": False},
)
nodes = [cluster.add_node(num_cpus=2) for _ in range(3)]
raylets = {node.node_id: node.all_processes["raylet"][0].process.pid for node in nodes}
print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
head, seen = GcsClient(address=cluster.address), set()
while True:
    for node in set(head.get_draining_nodes()) - seen:
        seen.add(node)
        print(json.dumps({"drained": node, "at": time.time()}), flush=True)
    time.sleep(0.02)
"""
"""A head that has too few cores for a worker, three nodes that have enough, and a word when one is drained. A process
of its own, as Ray reads once in a process how its members prove themselves."""

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
    "RAY_worker_register_timeout_seconds": "900",  # on a busy machine
    "RAY_worker_niceness": "0",
    "RAY_health_check_period_ms": "1000",  # a lost node is noticed after seconds
    "RAY_health_check_timeout_ms": "5000",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}


@pytest.fixture
def cluster() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    below = psutil.Process(process.pid).children(recursive=True)
    for one in (psutil.Process(process.pid), *below):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.communicate()


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next that a cluster says."""
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(next(process.stdout))
    return found


def take_away(raylet: int) -> None:
    """A machine goes with all that runs on it."""
    node = psutil.Process(raylet)
    for one in (node, *node.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


@contextlib.contextmanager
def watcher(node: str, server: MetadataServer, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """As a node starts it. It does not know Ray's token, which is found with Ray."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "study.clusters.nodes.notices", "--node-id", node],
        env={**known, **server.environment},
        stdin=subprocess.DEVNULL,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def node_of(driver: Driver) -> str:
    attempt = open_attempt(driver)
    assert attempt is not None
    return str(attempt["nodes"][0].split()[-1])


def newest_rung(driver: Driver) -> int:
    """The last step that was reported; every report comes with a checkpoint."""
    return max((int(str(event["step"])) for event in driver.events("rung")), default=0)


@pytest.mark.timeout(900)
def test_a_notice_costs_no_step_and_a_loss_what_came_after_the_checkpoint(
    tmp_path: Path, cluster: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    made = said(cluster)
    training = {**CONFIG["trial"]["training"], "epochs": 100}
    driver = Driver(
        tmp_path,
        cluster={"address": made["address"]},
        budget={"trials": 1, "max_failures": 1},
        recipes=[],
        points=POINTS[:1],
        trial={**CONFIG["trial"], "training": training, "workers": {"cpus_per_worker": 1.3}},
    )
    process = driver.start()
    assert wait_for(lambda: under_way(driver), process)
    (worker,) = victims(cluster.pid, "worker")
    worker.suspend()  # or the trial might be over before Ray's own watcher, a process too, has started
    first, log = node_of(driver), tmp_path / "notices.log"
    with MetadataServer("AWS") as server, watcher(first, server, log) as watching:
        assert wait_for(lambda: "watching for notices of AWS" in log.read_text(), process)
        assert wait_for(lambda: victims(cluster.pid, "watcher"), process)
        worker.resume()
        noticed = time.time()
        end = datetime.fromtimestamp(noticed + AWS_SECONDS, UTC)
        server.action = json.dumps({"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"})
        drained = said(cluster)
        assert drained["drained"] == first
        assert wait_for(lambda: len(ended(driver)) == 1, process)
        assert watching.wait(60) == 0
    take_away(made["raylets"][first])
    assert wait_for(lambda: newest_rung(driver) > ended(driver)[0]["to_step"], process)
    second = node_of(driver)
    take_away(made["raylets"][second])
    driver.output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, driver.output

    told, lost, last = ended(driver)
    assert [one["cause"] for one in (told, lost, last)] == ["preempted", "infrastructure", "complete"]
    assert len({one["nodes"][0] for one in (told, lost, last)}) == 3
    assert told["reason"].endswith(f"a checkpoint of step {lost['from_step']}")
    assert lost["from_step"] >= told["to_step"], "after a notice nothing is done again"
    assert last["from_step"] >= lost["to_step"] > lost["from_step"], "without, what came after the last checkpoint"
    waited, moved = drained["at"] - noticed, told["ended"] - noticed
    print(f"{log.read_text()}drained {waited:.1f} s after the notice, the checkpoint stood after {moved:.1f} s")
    assert waited < 5 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1)), "5 s, where nothing else runs"
    (manifest,) = driver.manifests().values()
    assert manifest["state"] == "complete"
    assert manifest["cost"]["device_seconds"] == pytest.approx(
        sum(one["ended"] - one["began"] for one in (told, lost, last)), rel=0.05
    ), "what was held until the notice and the loss is counted"
