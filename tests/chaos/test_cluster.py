"""Trials of two workers on a cluster whose nodes come and go: the study ends as if undisturbed."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.table import Tell
from tests.chaos.test_kill_and_resume import CONFIG, Driver
from tests.chaos.test_real import another_rung, entries, lose, outcome, victims, wait_for

pytestmark = pytest.mark.chaos

NODE: dict[str, Any] = {"num_cpus": 2}
"""Enough for one of a trial's two workers."""

NOTICE_SECONDS = 1200.0
"""Of a node that is drained: whatever is done about it is done in half of that, on a busy machine too."""

POINTS = [
    {"contrastive_weight": 0.0, "temperature": 0.1, "epsilon": "2/255", "attack_steps": 2, "words": 0},
    {"contrastive_weight": 1.0, "temperature": 0.06, "epsilon": "2/255", "attack_steps": 2, "words": 1},
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that has too few cores for a worker; nodes are still to come."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "900")  # on a busy machine
    monkeypatch.setenv("RAY_worker_niceness", "0")  # the same
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "resources": {"trial_driver": 8}, "include_dashboard": False},
    )
    yield made
    made.shutdown()


def two_workers(points: int, epochs: int, cores: float) -> dict[str, Any]:
    """Fields of a study whose trials have two workers of so many cores."""
    training = {**CONFIG["trial"]["training"], "epochs": epochs}
    return {
        "budget": {"trials": points},
        "recipes": [],
        "points": POINTS[:points],
        "trial": {**CONFIG["trial"], "training": training, "workers": {"count": 2, "cpus_per_worker": cores}},
    }


def open_attempt(driver: Driver) -> dict[str, Any] | None:
    """The newest attempt, if it runs."""
    found = [event["attempt"] for event in sorted(driver.events("attempt"), key=lambda event: event["time"])]
    return found[-1] if found and found[-1]["ended"] is None else None


def under_way(driver: Driver) -> bool:
    """Whether the newest attempt runs and has told of a rung: its workers are there."""
    attempt = open_attempt(driver)
    return attempt is not None and any(event["time"] > attempt["began"] for event in driver.events("rung"))


def node_of(cluster: Any, driver: Driver, rank: int) -> Any:
    """The node with the worker of a rank."""
    attempt = open_attempt(driver)
    assert attempt is not None
    wanted = attempt["nodes"][rank].split()[-1]
    (node,) = [node for node in cluster.worker_nodes if node.node_id == wanted]
    return node


def worker_on(node: Any) -> psutil.Process:
    (worker,) = [
        child
        for child in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::RayTrainWorker")
    ]
    return worker


def drain(cluster: Any, node: Any, seconds: float) -> None:
    """What a spot watcher does when it is told that the node will be taken away."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id, reason, "spot", int((time.time() + seconds) * 1000)
    )
    assert accepted, why


def disturb(cluster: Any, driver: Driver, process: subprocess.Popen[str], what: str) -> subprocess.Popen[str]:
    """Do it, and see that there are devices again; returns the driver, which may be another one."""
    kind, _, rank = what.partition(" ")
    if kind == "worker":
        worker_on(node_of(cluster, driver, int(rank))).kill()
    elif kind == "node":
        lose(cluster, node_of(cluster, driver, int(rank)))
        cluster.add_node(**NODE)
    elif kind == "drain":
        node = node_of(cluster, driver, int(rank))
        worker = worker_on(node)
        worker.suspend()  # or the trial might be over before Ray's watcher, a process of its own, has started
        drain(cluster, node, NOTICE_SECONDS)
        wait_for(lambda: victims(os.getpid(), "watcher"), process)
        worker.resume()
        wait_for(lambda: open_attempt(driver) is None, process, NOTICE_SECONDS / 2)
        lose(cluster, node)
        cluster.add_node(**NODE)
    elif kind == "driver":
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return driver.start()
    else:
        victims(cluster.head_node.all_processes["raylet"][0].process.pid, kind)[0].kill()
    return process


NEXT = "next trial"
"""Among what is done: nothing more until another trial begins."""


def another_trial(driver: Driver, process: subprocess.Popen[str]) -> None:
    begun = len(driver.events("start"))
    assert wait_for(lambda: len(driver.events("start")) > begun, process)


def ended(driver: Driver) -> list[dict[str, Any]]:
    """Attempts that have ended, in order."""
    events = sorted(driver.events("attempt"), key=lambda event: event["time"])
    return [event["attempt"] for event in events if event["attempt"]["ended"] is not None]


CAUSED = {"drain": "preempted", "driver": "interrupted"}
"""By what was done; anything else is the infrastructure's doing."""


def endure(cluster: Any, driver: Driver, process: subprocess.Popen[str], done: list[str], draw: random.Random) -> None:
    """Disturb a study after one rung and another, and see that all is accounted for."""
    for what in done:
        if what == NEXT:
            another_trial(driver, process)
            continue
        assert another_rung(driver, process), "the study ended before everything was done"
        time.sleep(draw.uniform(0, 1))
        assert wait_for(lambda: under_way(driver), process)  # that rung may be a last word of the attempt before
        process = disturb(cluster, driver, process, what)
    driver.output, _ = process.communicate(timeout=3000)
    assert process.returncode == 0, driver.output
    causes = [CAUSED.get(what.split()[0], "infrastructure") for what in done if what != NEXT]
    assert [attempt["cause"] for attempt in ended(driver) if attempt["cause"] != "complete"] == causes
    all_accounted_for(driver)


def all_accounted_for(driver: Driver) -> None:
    """Every attempt of a trial went on where the one before it was."""
    tries = ended(driver)
    assert len([event for event in driver.events("attempt") if event["attempt"]["ended"] is None]) >= len(tries)
    for key in driver.manifests():
        mine = [json.loads(line)["attempt"] for line in (driver.study / "trials" / key / "events.jsonl").open()]
        last = [attempt for attempt in mine if attempt and attempt["ended"] is not None]
        for before, after in itertools.pairwise(last):
            assert after["from_step"] >= before["to_step"], "what was reported was done again"
            if before["cause"] == "preempted":
                assert before["reason"].endswith(f"of step {after['from_step']}"), before


def both(folder: Path, points: int, epochs: int, cluster: Any, retries: int) -> tuple[Driver, Driver]:
    """A study on the cluster, and the same one on this machine."""
    shared = {"cache_dir": str(folder / "cache")}  # what is prepared for one is there for the other
    given = {"cluster": {"address": cluster.address}, "budget": {"trials": points, "max_failures": retries}}
    fields = {
        "disturbed": {**two_workers(points, epochs, 1.3), **given},
        "undisturbed": two_workers(points, epochs, 1.0),
    }
    for name in fields:
        (folder / name).mkdir()
    disturbed, whole = (Driver(folder / name, **fields[name], **shared) for name in fields)
    return disturbed, whole


@pytest.mark.timeout(1500)
def test_devices_come_late_and_go(tmp_path: Path, cluster: Any, long_chaos: bool, tell: Tell) -> None:
    done = ["drain 0", "worker 1"] if long_chaos else ["drain 0"]
    driver, whole = both(tmp_path, points=1, epochs=8 * len(done), cluster=cluster, retries=1)
    process = driver.start()
    assert process.stdout is not None
    lines = list(itertools.takewhile(lambda line: "waiting for devices: 2 x" not in line, process.stdout))
    assert whole.finish() == 0, whole.output  # meanwhile, for longer than Ray would wait
    assert process.poll() is None, lines
    assert not driver.events("start"), "nothing is proposed for devices that are not there"
    assert not victims(cluster.head_node.all_processes["raylet"][0].process.pid, "trial"), lines
    for _ in range(2):
        cluster.add_node(**NODE)
    endure(cluster, driver, process, done, random.Random(1))
    found, expected = outcome(driver), outcome(whole)
    for what in ("devices late", *done):
        tell(f"two workers: {what}", 1, entries(found), entries(expected), found == expected)
    assert found == expected


@pytest.fixture
def in_full(long_chaos: bool) -> None:
    """Before any other fixture, which would start a cluster."""
    if not long_chaos:  # nine losses, each with cold processes; the form before it has one, and always runs
        pytest.skip("a quarter of an hour: run with --long-chaos")


@pytest.mark.usefixtures("in_full")
@pytest.mark.timeout(5000)
def test_ranks_nodes_and_processes_of_two_workers(tmp_path: Path, cluster: Any, tell: Tell) -> None:
    done = [f"{kind} {rank}" for kind in ("worker", "node", "drain") for rank in (0, 1)]
    done += ["controller", "trial", "driver"]
    draw = random.Random(2)
    draw.shuffle(done)
    done.insert(len(done) // 2, NEXT)
    driver, whole = both(tmp_path, points=len(POINTS), epochs=40, cluster=cluster, retries=len(done))
    for _ in range(2):
        cluster.add_node(**NODE)
    endure(cluster, driver, driver.start(), done, draw)
    assert whole.finish() == 0, whole.output
    found, expected = outcome(driver), outcome(whole)
    for kind in dict.fromkeys(what.split()[0] for what in done if what != NEXT):
        times = sum(what.startswith(kind) for what in done)
        tell(f"two workers: {kind}", times, entries(found), entries(expected), found == expected)
    assert found == expected
