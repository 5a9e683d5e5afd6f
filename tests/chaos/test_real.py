"""The processes of real trials killed, and a whole node: the study ends as if undisturbed."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.table import Tell
from tests.chaos.test_kill_and_resume import CONFIG, Driver

pytestmark = pytest.mark.chaos

VICTIMS = {
    "worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "trial": "ray::ImplicitFunc",
    "watcher": "ray::PreemptionWatcher",
}
"""Ray's names of the processes of a trial."""


def victims(driver: int, kind: str) -> list[psutil.Process]:
    """Processes of a kind below a driver."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith(VICTIMS[kind]):
                found.append(child)
        except (psutil.NoSuchProcess, IndexError):
            continue
    return found


def wait_for(happened: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 600) -> bool:
    """False if the driver ended instead."""
    end = time.time() + seconds
    while not happened():
        if process.poll() is not None:
            return False
        assert time.time() < end, "waited too long"
        time.sleep(0.1)
    return True


def another_rung(driver: Driver, process: subprocess.Popen[str]) -> bool:
    """Wait for it; False if the study ended instead."""
    seen = len(driver.events("rung"))
    return wait_for(lambda: len(driver.events("rung")) > seen, process)


def strike(process: subprocess.Popen[str], kind: str) -> bool:
    """Kill a process of the kind as soon as there is one; False if the study ended instead."""
    if wait_for(lambda: victims(process.pid, kind), process):
        victims(process.pid, kind)[0].kill()
        return True
    return False


def kill_through(driver: Driver, kinds: list[str], draw: random.Random) -> int:
    """Kill one process after another, each after another rung, and let the study finish. Returns the kills."""
    kills = 0
    process = driver.start()
    for kind in kinds:
        if not another_rung(driver, process):
            break
        time.sleep(draw.uniform(0, 1))
        if kind == "driver":
            process.send_signal(signal.SIGKILL)
            process.communicate()
            process = driver.start()
        elif not strike(process, kind):
            break
        kills += 1
    driver.output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, driver.output
    return kills


def outcome(driver: Driver) -> dict[str, Any]:
    """What has to be the same however a study was disturbed."""
    manifests = driver.manifests()
    runs = driver.mlflow_runs()
    return {
        "trials": {key: (m["state"], m["params"], m["metrics"]) for key, m in manifests.items()},
        "optuna": driver.optuna_states(),
        "front": [(e["key"], e["values"]) for e in json.loads((driver.study / "front.json").read_text())],
        "runs": sorted((run.info.run_name, run.info.status, run.data.tags.get("pareto")) for run in runs),
    }


def entries(account: dict[str, Any]) -> list[object]:
    """Every trial of the database by its place, and every manifest and MLflow run by its name."""
    numbers = range(len(account["optuna"]))
    return [*numbers, *(("manifest", key) for key in account["trials"]), *(("run", run[0]) for run in account["runs"])]


@pytest.mark.timeout(3000)
def test_processes_of_real_trials_killed(tmp_path: Path, long_chaos: bool, tell: Tell) -> None:
    kinds = ["worker", "controller", "trial"]
    if long_chaos:
        kinds = [*kinds, "driver"] * 3
    trials = 4 if long_chaos else 2
    # Where only images are compared, all of the text side is trained without ever having a gradient.
    points = [{"contrastive_weight": 0.0, "temperature": 0.1, "epsilon": "2/255", "attack_steps": 2, "words": 0}]
    accounts = []
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
        budget = {"trials": trials, "max_failures": 12}
        cache = str(tmp_path / "cache")
        fields = {"budget": budget, "recipes": [], "points": points, "cache_dir": cache}
        driver = Driver(tmp_path / name, cluster={"concurrency": 1}, **fields)
        kills = kill_through(driver, kinds if name == "killed" else [], random.Random(3))
        if name == "killed":
            assert kills == len(kinds), "the study ended before everything was killed"
        accounts.append(outcome(driver))
    killed, undisturbed = accounts
    for kind in dict.fromkeys(kinds):
        what = f"{kind} of a real study killed"
        tell(what, kinds.count(kind), entries(killed), entries(undisturbed), killed == undisturbed)
    assert killed == undisturbed


@pytest.fixture
def three_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that has too few cores for the workers of a trial, and two nodes that have enough."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "900")  # on a busy machine
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "resources": {"trial_driver": 8}, "include_dashboard": False},
    )
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def lose(cluster: Any, node: Any) -> None:
    """A machine goes with all that runs on it; Ray's own call leaves the workers to find out."""
    workers = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


@pytest.mark.timeout(1500)
def test_a_node_is_lost(tmp_path: Path, three_nodes: Any, long_chaos: bool, tell: Tell) -> None:
    if not long_chaos:  # Ray gives up on a silent node after minutes, which every run of the tests would wait for
        pytest.skip("the loss of a node takes minutes to be noticed: run with --long-chaos")
    # Long enough for the cluster to lose a node and get another one meanwhile.
    training = {**CONFIG["trial"]["training"], "epochs": 100}
    drivers = []
    for name, cluster in (("lost", {"address": three_nodes.address}), ("undisturbed", {})):
        (tmp_path / name).mkdir()
        drivers.append(
            Driver(
                tmp_path / name,
                budget={"trials": 1},
                recipes=["mat"],
                cluster={**cluster, "concurrency": 1},
                trial={**CONFIG["trial"], "training": training, "workers": {"cpus_per_worker": 1.3}},
            )
        )
    driver, whole = drivers
    process = driver.start()
    lost = 0
    for node in list(three_nodes.worker_nodes):
        if another_rung(driver, process):
            lose(three_nodes, node)
            three_nodes.add_node(num_cpus=2)
            lost += 1
    driver.output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, driver.output
    assert [manifest["state"] for manifest in driver.manifests().values()] == ["complete"] * 2
    assert driver.optuna_states() == ["COMPLETE"] * 2
    assert any(event["step"] for event in driver.events("resume")), "no trial was on a node that was lost"
    assert whole.finish() == 0, whole.output
    found, expected = outcome(driver), outcome(whole)
    tell("node of three lost", lost, entries(found), entries(expected), found == expected)
    assert found == expected
