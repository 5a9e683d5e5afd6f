"""Notices of preemption: read from a strict metadata server, turned into one drain, whatever is away meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from study.clusters.nodes import notices
from study.clusters.nodes.metadata import ANSWER_SECONDS, Aws, Cloud, Gcp, NoAnswer, Notice, aws_notice
from study.clusters.nodes.notices import LEAST_SECONDS, LONGEST_SECONDS, Node, cloud_here, drain, main, only_one, watch
from tests.metadata_server import LATER, MetadataServer

NOW = 1_000_000.0
CLOUDS: dict[str, type[Cloud]] = {"AWS": Aws, "GCP": Gcp}
GOES = {"AWS": f'{{"action": "terminate", "time": "{LATER}"}}', "GCP": "TRUE"}
STAYS = {"AWS": None, "GCP": "FALSE"}


@pytest.fixture(params=CLOUDS)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    with MetadataServer(request.param) as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        yield made


@pytest.fixture
def cloud(server: MetadataServer) -> Cloud:
    return CLOUDS[server.cloud]()


def test_the_cloud_is_the_one_that_answers(server: MetadataServer) -> None:
    found = cloud_here((Aws(), Gcp()), waits=[0])
    assert found is not None
    assert found.name == server.cloud


def test_a_machine_in_neither_cloud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []
    with MetadataServer("another") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        assert cloud_here((Aws(), Gcp()), waits=[0, 1, 2], pause=waited.append) is None
    assert cloud_here((Aws(), Gcp()), waits=[3], pause=waited.append) is None
    assert waited == [0, 1, 2, 3], "a network that is not there yet may come"
    monkeypatch.setattr(notices, "cloud_here", lambda clouds: None)
    assert main([]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("neither AWS nor GCP answers on this machine: there are no notices to watch for")


def test_nothing_then_a_notice(server: MetadataServer, cloud: Cloud) -> None:
    assert cloud.notice(NOW) is None
    server.action = GOES[server.cloud]
    expected = {
        "AWS": Notice(1893553445.0, f"AWS will terminate this instance at {LATER}"),
        "GCP": Notice(NOW + 30, "GCP preempts this machine"),
    }
    assert cloud.notice(NOW) == expected[server.cloud]


@pytest.mark.parametrize("server", ["AWS"], indirect=True)
def test_a_token_is_used_until_it_is_too_old(server: MetadataServer, cloud: Cloud) -> None:
    for _ in range(5):
        assert cloud.notice(NOW) is None
    assert len(server.tokens) == 1
    server.tokens = dict.fromkeys(server.tokens, 0.0)
    server.action = GOES["AWS"]
    assert cloud.notice(NOW) is not None
    assert len(server.tokens) == 2
    server.token_seconds = -1
    server.tokens.clear()
    with pytest.raises(NoAnswer, match="status 401"):
        cloud.notice(NOW)


@pytest.mark.parametrize(
    ("text", "deadline"),
    [
        ('{"action": "stop", "time": "2001-09-09T01:46:40Z"}', 1e9),
        ('{"action": "hibernate"}', NOW + 120),
        ('{"action": "terminate", "time": "soon"}', NOW + 120),
        ('{"action": "terminate", "time": 5}', NOW + 120),
    ],
)
def test_a_notice_of_aws_without_a_time_that_can_be_read_is_one(
    text: str, deadline: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        assert aws_notice(text, NOW).deadline == deadline
    time.tzset()


@pytest.mark.parametrize("text", ["", "<html>", "[]", "null", '"terminate"', '{"time": "2001-09-09T01:46:40Z"}', "{"])
def test_what_is_no_notice_is_told(server: MetadataServer, cloud: Cloud, text: str) -> None:
    server.action = text
    with pytest.raises(NoAnswer, match=r"which names no action|neither TRUE nor FALSE"):
        cloud.notice(NOW)
    server.status = 503
    with pytest.raises(NoAnswer, match="answers with status 503"):
        cloud.notice(NOW)


class Life:
    """A watcher's world: what happens at each of its pauses; Ray ends with the last."""

    def __init__(self, *events: Callable[[], object]) -> None:
        self.events = list(events)
        self.pauses: list[float] = []
        self.lines: list[str] = []
        self.drains: list[Notice] = []
        self.refusal = ""

    def alive(self) -> bool:
        return len(self.pauses) <= len(self.events)

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if self.alive():
            self.events[len(self.pauses) - 1]()

    def drained(self, notice: Notice) -> str:
        self.drains.append(notice)
        return self.refusal

    def under(self, cloud: Cloud) -> Life:
        watch(cloud, self.alive, self.drained, self.lines.append, self.pause)
        return self


def nothing() -> None:
    pass


def test_one_drain_for_a_notice(server: MetadataServer, cloud: Cloud) -> None:
    life = Life(nothing, lambda: setattr(server, "action", GOES[server.cloud]), nothing, nothing).under(cloud)
    (told,) = life.drains
    assert told.deadline == pytest.approx({"AWS": 1893553445, "GCP": time.time() + 30}[server.cloud], abs=5)
    assert len(life.pauses) == 2
    (line,) = life.lines
    assert "Ray was told within 0.0 s" in line


def test_it_ends_with_ray(cloud: Cloud) -> None:
    life = Life(nothing).under(cloud)
    assert not life.drains
    assert life.lines == ["Ray has ended on this machine, and so does its watcher"]


def test_a_server_that_is_away_is_asked_less_often_and_does_no_harm(server: MetadataServer, cloud: Cloud) -> None:
    def back() -> None:
        made = MetadataServer(server.cloud, server.port)
        made.action = GOES[server.cloud]

    life = Life(server.end, nothing, nothing, nothing, nothing, back).under(cloud)
    assert life.pauses == [1.0, 2.0, 4.0, 8.0, LONGEST_SECONDS, LONGEST_SECONDS]
    assert len(life.drains) == 1
    assert [line.partition(" (")[0] for line in life.lines[:2]] == [
        f"http://127.0.0.1:{server.port}{'/' * (server.cloud == 'AWS')} does not answer",
        f"{server.cloud} answers again",
    ]
    assert len(life.lines) == 3


def test_a_server_that_hangs_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(NoAnswer, match="timed out"):
            Gcp().notice(NOW)
        assert time.monotonic() - began < ANSWER_SECONDS + 2


def test_a_head_that_is_away_is_told_when_it_is_back(server: MetadataServer, cloud: Cloud) -> None:
    server.action = GOES[server.cloud]
    life = Life(nothing, server.end, lambda: setattr(life, "refusal", ""))
    life.refusal = "the head is away"
    life.under(cloud)
    assert len(life.drains) == 4, "also while the metadata server is away"
    assert len(set(life.drains)) == 1, "with the first deadline"
    assert life.pauses == [1.0] * 3
    assert [("cannot be told: the head is away" in line, "Ray was told" in line) for line in life.lines] == [
        (True, False),
        (False, False),
        (False, True),
    ]


def test_a_notice_that_is_withdrawn_before_ray_is_told_is_forgotten(server: MetadataServer, cloud: Cloud) -> None:
    server.action = GOES[server.cloud]
    life = Life(lambda: setattr(server, "action", STAYS[server.cloud]), nothing)
    life.refusal = "the head is away"
    life.under(cloud)
    assert len(life.drains) == 1
    assert life.lines[1] == "the notice was withdrawn"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Some process instead of Ray's agent."""
    process = subprocess.Popen(["sleep", "100"], env={**os.environ, "RAY_AUTH_MODE": "token"})
    yield Node(psutil.Process(process.pid), "ab12", "10.0.0.1:6379", tmp_path)
    process.kill()
    process.wait()


def test_a_deadline_in_the_past_leaves_trials_some_seconds(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append((command[3:], env["RAY_AUTH_MODE"]))
        return subprocess.CompletedProcess(command, 1, "", "much\nlast line\n")

    monkeypatch.setattr(notices.subprocess, "run", run)
    for deadline in (0.0, 1893553445.0):
        assert drain(node, Notice(deadline, "why")) == "last line"
    ((early, mode), (late, _)) = calls
    assert early[:2] == ["10.0.0.1:6379", "ab12"]
    assert int(early[2]) / 1000 - time.time() == pytest.approx(LEAST_SECONDS, abs=2)
    assert late[2:] == ["1893553445000", "why"]
    assert mode == "token", "Ray's own environment, not that of the watcher"


def test_a_node_that_ended_is_not_alive(node: Node) -> None:
    assert node.alive()
    node.process.kill()
    end = time.time() + 30
    while node.alive() and time.time() < end:
        time.sleep(0.01)
    assert node.process.status() == psutil.STATUS_ZOMBIE, "as long as nobody asks for its end"
    assert not node.alive()
    node.process.wait()
    assert not node.alive()


def test_a_second_watcher_of_a_node_is_none(node: Node) -> None:
    with only_one(node) as first, only_one(node) as second:
        assert (first, second) == (True, False)
    with only_one(node) as again:
        assert again


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_a_machine_leaves_in_seconds_to_come(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--leaves-in={seconds}"]) == 2
    assert f"error: --leaves-in: {seconds} is no time to come" in capsys.readouterr().err


def test_where_ray_does_not_run_nothing_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--leaves-in", "60", "--node-id", "no-such"]) == 2
    assert capsys.readouterr().err == "error: Ray does not run on this machine as no-such\n"


def test_it_holds_few_megabytes(server: MetadataServer) -> None:
    command = [sys.executable, "-m", "study.clusters.nodes.notices", "--node-id", "no-such"]  # waits for Ray
    process = subprocess.Popen(command, env={**os.environ, **server.environment})
    try:
        end = time.time() + 60
        while not (server.asked or server.tokens) and time.time() < end:
            time.sleep(0.1)
        time.sleep(2)
        resident = psutil.Process(process.pid).memory_info().rss / 1e6
    finally:
        process.kill()
        process.wait()
    print(f"the watcher holds {resident:.0f} MB")
    assert resident < 35, "without torch, Ray or pydantic"
