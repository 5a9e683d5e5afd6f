"""The head goes with the driver, all of Ray and its disk: the same command on another head goes on with the study."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.test_cluster import POINTS, ended, under_way
from tests.chaos.test_kill_and_resume import CONFIG, Driver
from tests.chaos.test_real import wait_for
from trainables.execution.reserved import node_id

pytestmark = pytest.mark.chaos


@contextmanager
def head_and_node() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    resources = {"num_cpus": 1, "resources": {"trial_driver": 8}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=resources)
    try:
        cluster.add_node(num_cpus=2)
        yield cluster
    finally:
        cluster.shutdown()


def study(folder: Path, address: str, cache: str) -> Driver:
    """One trial. What the head and the nodes have prepared is on their disks, and in the folder of all studies."""
    return Driver(
        folder,
        cluster={"address": address},
        cache_dir=str(folder / cache),
        budget={"trials": 1},
        recipes=[],
        points=POINTS[:1],
        trial={**CONFIG["trial"], "workers": {"cpus_per_worker": 1.3}},
    )


@pytest.fixture
def in_full(long_chaos: bool) -> None:
    """Before any cluster is started."""
    if not long_chaos:  # two clusters, one after the other; test_kill_and_resume.py has the form on one machine
        pytest.skip("a head that is lost, and another one: run with --long-chaos")


@pytest.mark.usefixtures("in_full")
@pytest.mark.timeout(900)
def test_another_head_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "900")  # on a busy machine
    with head_and_node() as first:
        driver = study(tmp_path, first.address, "first")
        process = driver.start()
        assert wait_for(lambda: under_way(driver), process), process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        nodes = {node.node_id for node in first.list_all_nodes()}
    with head_and_node() as second:
        driver = study(tmp_path, second.address, "second")
        assert driver.finish() in (0, 1), driver.output  # 1: what came out means little
    (manifest,) = driver.manifests().values()
    assert manifest["state"] == "complete"
    lost, last = ended(driver)
    assert (lost["cause"], last["cause"]) == ("interrupted", "complete")
    assert manifest["cost"]["resumed_from_steps"] == [last["from_step"]]
    assert last["from_step"] > 0, "it went on from its checkpoint"
    assert nodes.isdisjoint(map(node_id, last["nodes"]))
    assert driver.optuna_states() == ["COMPLETE"]
    shared = tmp_path / "studies" / ".shared"
    for what in ("base", "masked-lm", "tokenizer"):
        assert len([*shared.glob(f"{what}-*/*")]) == 1, "made once, and brought by the nodes of the other head"
        (name,) = (path.name for path in shared.glob(f"{what}-*") if path.is_dir())
        assert (tmp_path / "second" / name).is_dir() == (what != "masked-lm")
