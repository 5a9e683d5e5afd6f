"""A study on a cluster that starts from nothing: the autoscaler is real, machines are processes here."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.test_cluster import POINTS, ended, open_attempt, under_way
from tests.chaos.test_kill_and_resume import CONFIG, Driver
from tests.chaos.test_real import wait_for
from tests.cluster.fake_cloud import fake_cluster
from trainables.execution.reserved import node_id

NODES = 2
BOOT_SECONDS = 8.0
START_SECONDS = 4.0
"""Ray Train's patience with workers; 60 by default, where nodes take minutes."""

KINDS: dict[str, dict[str, Any]] = {  # equal in resources: Ray looks at these before anything else
    "spot": {"resources": {"CPU": 2}, "max_workers": NODES, "priority": 1},
    "on_demand": {"resources": {"CPU": 2}, "max_workers": NODES},
}

pytestmark = pytest.mark.chaos


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{START_SECONDS:g}",
        "RAY_worker_register_timeout_seconds": "900",  # on a busy machine
        "RAY_worker_niceness": "0",  # the same
        # A node whose processes are gone is missed after 5 s, and one that is only slow is not.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "5",
        "RAY_health_check_timeout_ms": "30000",
    }.items():
        monkeypatch.setenv(name, value)


def study(folder: Path, address: str, epochs: int) -> Driver:
    """Two trials, each of which takes a node."""
    training = {**CONFIG["trial"]["training"], "epochs": epochs}
    return Driver(
        folder,
        cluster={"address": address},
        cache_dir=str(folder / "cache"),
        budget={"trials": len(POINTS), "max_failures": 1},
        recipes=[],
        points=POINTS,
        trial={**CONFIG["trial"], "training": training, "workers": {"cpus_per_worker": 1.3}},
    )


def until(happened: Callable[[], Any], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.2)
    return bool(happened())


def side_by_side(driver: Driver) -> int:
    """Most attempts that held devices at once."""
    moments = [(attempt["began"], 1) for attempt in ended(driver)] + [(tried["ended"], -1) for tried in ended(driver)]
    held = most = 0
    for _, change in sorted(moments):
        held += change
        most = max(most, held)
    return most


@pytest.mark.timeout(900)
def test_a_study_from_no_node_to_no_node(tmp_path: Path) -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(
            fake_cluster(tmp_path, KINDS, nodes=NODES, refused=["spot"], boot_seconds=BOOT_SECONDS)
        )
        driver = study(tmp_path, cluster.address, epochs=16)
        process = driver.start()
        stack.callback(process.kill)
        assert wait_for(lambda: under_way(driver), process), process.communicate()[0]
        asked = cluster.requests()
        assert asked[0] == ("spot", True), "the kind of highest priority is tried first"
        assert ("on_demand", False) in asked, "the next kind is"
        assert len(cluster.workers()) <= NODES
        attempt = open_attempt(driver)
        assert attempt is not None
        lost = node_id(attempt["nodes"][0])
        cluster.lose(lost)
        driver.output, _ = process.communicate(timeout=600)

        assert "up to 2 at once, on all nodes that the autoscaler may start" in driver.output
        assert "2 trials" in driver.output.splitlines()[-2], driver.output
        assert [manifest["state"] for manifest in driver.manifests().values()] == ["complete"] * len(POINTS)
        causes = sorted(tried["cause"] for tried in ended(driver))
        assert causes == ["complete", "complete", "infrastructure"], "waiting for nodes is no attempt"
        (broken,) = [tried for tried in ended(driver) if tried["cause"] == "infrastructure"]
        assert node_id(broken["nodes"][0]) == lost
        assert all(
            lost not in node for tried in ended(driver) if tried["cause"] == "complete" for node in tried["nodes"]
        )
        assert side_by_side(driver) <= NODES
        assert until(lambda: not cluster.workers()), "idle nodes cost"
