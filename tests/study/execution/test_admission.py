"""What is asked of a cluster for the next attempts; Ray is one whose nodes are a list."""

from __future__ import annotations

import time
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest

from study.execution import admission
from study.execution.admission import Admission, Place
from trainables.config import WorkersConfig
from trainables.execution.reserved import Devices


class Cluster:
    """So many groups fit; those asked for first are held first."""

    def __init__(self, room: int = 0) -> None:
        self.room, self.made = room, 0
        self.asked: list[Any] = []

    def reserve(self, workers: WorkersConfig, left_out: Collection[str]) -> Any:
        self.made += 1
        number = self.made
        group = SimpleNamespace(id=SimpleNamespace(hex=lambda: f"{number:02x}"), left_out=set(left_out))
        self.asked.append(group)
        return group

    def held_on(self, group: Any) -> list[str] | None:
        return ["n"] if group in self.asked[: self.room] else None

    def give_back(self, group: Any) -> None:
        self.asked.remove(group)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    for name in ("reserve", "held_on", "give_back"):
        monkeypatch.setattr(admission, name, getattr(made, name))
    monkeypatch.setattr(admission, "devices_on", lambda ids: Devices([f"host {node}" for node in ids], "l4"))
    monkeypatch.setattr(admission, "able_nodes", lambda workers: {"a": 1, "b": 2})
    monkeypatch.setattr(admission, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(admission, "SAID_AFTER_SECONDS", 0.05)
    return made


def opened(said: list[str], most: int | None = None, grows_to: int | None = None) -> Admission:
    workers = WorkersConfig(count=2, cpus_per_worker=4, gpus_per_worker=1)
    return Admission(workers, most, said.append, str.upper, grows_to)


def test_a_cluster_grows_as_far_as_it_can_and_asks_for_no_more_than_is_left(cluster: Cluster) -> None:
    places = opened([])
    demand, taken = [], list[Place]()
    for room in (1, 3, 7, 15, 15):
        cluster.room = room
        while (place := places.take(len(taken), 20 - len(taken))) is not None:
            taken.append(place)
        demand.append(len(cluster.asked) - len(taken))
    assert len({place.id for place in taken}) == len(taken) == 15
    assert taken[0] == Place("01", ("host n",), "L4")
    assert demand == [2, 4, 8, 5, 5]
    assert places.take(15, 0) is None
    assert len(cluster.asked) == 15, "a node that nobody needs is not started"
    for place in taken:
        places.give_back(place)
        places.give_back(place)
    assert cluster.asked == []


def test_whether_there_is_a_place_elsewhere_counts_all_workers_of_an_attempt(cluster: Cluster) -> None:
    places = opened([])
    assert places.elsewhere(["host a"]), "two fit on the other"
    assert not places.elsewhere(["host b"])
    places.leave_out({"host b": ["1", "2"]})
    assert not places.elsewhere([]), "it stays left out"


def test_so_many_side_by_side_are_as_many_as_are_wanted(cluster: Cluster) -> None:
    cluster.room = 99
    places = opened([], most=3)
    taken = 0
    while places.take(taken, 50) is not None:
        taken += 1
    assert (taken, len(cluster.asked)) == (3, 3)


@pytest.mark.parametrize(
    ("most", "grows_to", "nodes", "asked"),
    [
        (None, 5, {"a": 2}, 5),  # all that the autoscaler may start, at once
        (3, 5, {"a": 2}, 3),
        (9, 5, {"a": 2}, 5),  # never more than there may be
        (None, 5, {"a": 8, "b": 6}, 7),  # nodes that came from elsewhere
        (9, 0, {}, 0),
        (None, None, {}, 1),
    ],
)
def test_no_more_is_asked_for_than_there_may_be(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, most: int | None, grows_to: int | None, nodes: Any, asked: int
) -> None:
    monkeypatch.setattr(admission, "able_nodes", lambda workers: nodes)
    assert opened([], most, grows_to).take(0, 50) is None
    assert len(cluster.asked) == asked


def test_what_is_asked_for_follows_the_nodes(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"a": 2}
    monkeypatch.setattr(admission, "able_nodes", lambda workers: nodes)
    places = opened([], grows_to=1)
    demand = []
    for count in (2, 8, 4):
        nodes["a"] = count
        places.take(0, 50)
        demand.append(len(cluster.asked))
    assert demand == [1, 4, 2]


def test_waiting_has_no_end_and_is_told_once(cluster: Cluster) -> None:
    said: list[str] = []
    places = opened(said)
    for _ in range(12):
        assert places.take(0, 5) is None
    assert said == ["waiting for devices: 2 x {CPU: 3.2, GPU: 1}"]
    assert len(cluster.asked) == cluster.made == 1, "it keeps its place in the queue"
    assert not places.due()
    cluster.room = 1
    place = places.take(0, 5)
    assert place is not None
    cluster.room = 0
    for _ in range(4):
        assert places.take(1, 4) is None
        time.sleep(admission.SAID_AFTER_SECONDS / 2)
    assert len(said) == 1, "others run meanwhile"
    assert places.take(1, 4) is None
    assert not places.due()
    places.give_back(place)
    assert places.due(), "there is room now"
    places.close()
    assert cluster.asked == []


def test_a_node_that_is_left_out_is_not_asked_for_again(cluster: Cluster) -> None:
    said: list[str] = []
    places = opened(said)
    places.take(0, 5)
    assert [group.left_out for group in cluster.asked] == [set()]
    for _ in range(2):
        places.leave_out({"host a": ["1", "2"]})
        places.take(0, 5)
        assert [group.left_out for group in cluster.asked] == [{"a"}]
    assert [line for line in said if "waiting" not in line] == [
        "left out from now on: 2 trials failed on host a and came further elsewhere: 1, 2"
    ]
