"""Studies as jobs of a real head, from a machine that comes and goes. What the jobs run stands in for a study."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import study.submit
from study.clusters.checks.parts import Surroundings
from study.clusters.files.local import Settings, render
from study.clusters.submission.jobs import Job
from study.clusters.submission.launcher import Launcher, State
from study.clusters.submission.requests import described
from study.doctor import surroundings
from study.submit import Submission, over_ssh
from tests.study.clusters.submission.ray_head import TOKEN, WAIT_SECONDS, Head, running, wait_for
from tests.study.helpers import complete, opened, run_next
from tests.study.helpers import study as configured
from trainables.errors import InputError


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    pytest.importorskip("aiohttp_cors", reason="the job server needs ray[default]")
    with running(tmp_path_factory.mktemp("head")) as made:
        yield made


class Laptop:
    """A folder and a home of its own, from which commands are given."""

    def __init__(self, folder: Path, head: Head, url: str | None = None) -> None:
        self.folder, self._head, self._url = folder, head, url or head.url
        self.folder.mkdir()
        (self.folder / ".ray").mkdir()
        (self.folder / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
        self.log = self.folder / "log"

    def submit(self, name: str, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "study.submit", "--cluster", self._url, "--name", name]
        command += ["--studies-dir", str(self._head.studies), *flags]
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, "HOME": str(self.folder)},
            )
        self._head.followers.append(process)
        return process

    def ended(self, name: str, *flags: str) -> int:
        return self.submit(name, *flags).wait(WAIT_SECONDS)

    def sees(self, text: str) -> None:
        wait_for(lambda: text in self.log.read_text())

    def assert_whole_log(self) -> None:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("line ")]
        assert lines == [f"line {number} {'x' * (number % 50)}" for number in range(3000)]
        assert "the last line" in self.log.read_text()


def test_the_same_job_from_elsewhere_after_a_kill(head: Head, tmp_path: Path) -> None:
    first, second = Laptop(tmp_path / "first", head), Laptop(tmp_path / "second", head)
    process = first.submit("killed", "--seed", "3")
    first.sees("line 1499")
    assert "begun with token --name killed" in first.log.read_text()
    process.kill()
    process.wait()
    follower = second.submit("killed")
    second.sees("line 1499")
    head.go("killed", 1)
    assert follower.wait(WAIT_SECONDS) == 1
    assert head.jobs("killed") == ["paretovl-killed-1"]
    second.assert_whole_log()
    assert "paretovl-killed-1 runs with other flags" in second.log.read_text()
    assert "the results were not fetched: there is no study" in second.log.read_text()


def test_what_did_not_end_is_submitted_again_and_what_did_is_fetched(head: Head, tmp_path: Path) -> None:
    config = configured(head.studies, name="s")
    ledger = opened(config)
    run_next(ledger, config, complete())
    (config.paths.front).write_text("[]")
    laptop, other = Laptop(tmp_path / "laptop", head), Laptop(tmp_path / "other", head)
    (config.paths.root / "go").write_text("2")
    assert laptop.ended("s") == 2
    assert not (laptop.folder / "studies").exists(), "nothing was begun"
    (config.paths.root / "go").write_text("0")
    assert laptop.ended("s") == 0
    told = laptop.log.read_text()
    assert "paretovl-s-1 ended with exit code 2; its last lines:\nline " in told
    assert "study submitted as paretovl-s-2, after paretovl-s-1" in told
    assert other.ended("s") == 0
    assert head.jobs("s") == ["paretovl-s-1", "paretovl-s-2"]
    other.assert_whole_log()
    fetched = other.folder / "studies" / "s"
    found = {str(path.relative_to(fetched)) for path in fetched.rglob("*") if path.is_file()}
    assert found == {"study.yaml", "front.json", *(f"export/{name}.csv" for name in ("trials", "attempts", "events"))}
    assert "s-t00000-s0" in (fetched / "export" / "trials.csv").read_text()
    assert (fetched / "study.yaml").read_text() == config.paths.config.read_text()


class Proxy(threading.Thread):
    """A way to the head that can be cut."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self._target, self._open, self._pairs = target, True, list[socket.socket]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        while True:
            client, _ = self._server.accept()
            if not self._open:
                client.close()
                continue
            there = socket.create_connection(("127.0.0.1", self._target))
            self._pairs += [client, there]
            for source, sink in ((client, there), (there, client)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self._open = False
        for one in self._pairs:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._open = True


def test_a_lost_connection_is_found_again(head: Head, tmp_path: Path) -> None:
    proxy = Proxy(head.port)
    laptop = Laptop(tmp_path / "laptop", head, proxy.url)
    process = laptop.submit("lost")
    laptop.sees("line 1499")
    proxy.cut()
    laptop.sees("next attempt is in 1 s")
    proxy.mend()
    laptop.sees("connected again")
    time.sleep(3)  # now it is told again from the beginning
    proxy.cut()
    head.go("lost", 75)
    wait_for(lambda: head.asked("/api/jobs/paretovl-lost-1")["status"] == "FAILED")
    proxy.mend()
    assert process.wait(WAIT_SECONDS) == 75
    laptop.assert_whole_log()


def test_it_is_stopped_in_order(head: Head, tmp_path: Path) -> None:
    laptop, other = Laptop(tmp_path / "laptop", head), Laptop(tmp_path / "other", head)
    assert other.ended("stopped", "--stop") == 0
    assert "nothing of study stopped runs" in other.log.read_text()
    process = laptop.submit("stopped")
    laptop.sees("line 1499")
    assert other.ended("stopped", "--stop") == 0
    assert "stopped in order" in other.log.read_text()
    assert process.wait(WAIT_SECONDS) == 75
    assert "to go on: python -m study.submit" in laptop.log.read_text()


def test_ctrl_c_leaves_the_job(head: Head, tmp_path: Path) -> None:
    laptop = Laptop(tmp_path / "laptop", head)
    process = laptop.submit("left")
    laptop.sees("line 1499")
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_SECONDS) == 130
    assert "--name left" in laptop.log.read_text().partition("to stop it: ")[2]
    assert head.asked("/api/jobs/paretovl-left-1")["status"] == "RUNNING"
    head.go("left", 0)


def test_refusals(head: Head, tmp_path: Path) -> None:
    laptop = Laptop(tmp_path / "laptop", head)
    (laptop.folder / ".ray" / "auth_token").write_text("another")
    assert laptop.ended("refused") == 2
    assert "does not accept the token" in laptop.log.read_text()
    (laptop.folder / "studies" / "refused").mkdir(parents=True)
    (laptop.folder / "studies" / "refused" / "study.db").touch()
    assert laptop.ended("refused") == 2
    assert "is a study of this machine" in laptop.log.read_text()
    assert head.jobs("refused") == []


class Recorded(Launcher):
    """In place of Ray's launcher and ssh: what is asked of it, and a head that is there."""

    def __init__(self, head: Head, *states: State) -> None:
        settings = Settings(head="10.0.0.1", workers=("10.0.0.2",), shared=head.home)
        written = render(settings).replace(settings.places.program(""), "")  # its programs are on the PATH
        self.config, self.file = yaml.safe_load(written), head.home / "cluster.yaml"
        self._head, self._states, self.done = head, list(states), list[str]()

    def state(self) -> State:
        return self._states.pop(0)

    def up(self, restart: bool = False) -> None:
        self.done.append("ray up" if restart else "ray up --no-restart")

    def put(self, text: str, target: str) -> None:
        self.done.append(target)
        Path(target.replace("~", str(self._head.home))).write_text(text)

    def address(self) -> str:
        return self._head.url

    def connect(self) -> None:
        self.done.append("connect")

    def disconnect(self) -> None:
        self.done.append("disconnect")


NOWHERE = Head(0, Path("/mnt/paretovl/studies"))


def fine(config: dict[str, Any]) -> Surroundings:
    """A machine that has all that a cluster file asks for."""
    return replace(
        surroundings(config),
        files=frozenset([*config["file_mounts"].values(), config["auth"]["ssh_private_key"]]),
        programs=frozenset(["ssh", "rsync"]),
    )


def test_a_cluster_is_brought_up_and_a_password_is_brought_there(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(study.submit, "surroundings", fine)
    launcher = Recorded(head, "down", "down")
    password = {"PARETOVL_STORAGE": "postgresql+psycopg://me:hush hush@db/x"}
    request = described(["--name", "secret"], None, password, launcher.config)
    (head.studies / "secret").mkdir()
    (head.studies / "secret" / "go").write_text("2")
    assert over_ssh(launcher, False, request, "again") == 2
    assert launcher.done == [*("ray up --no-restart", "ray up", "connect", "~/.paretovl-secret.env", "disconnect")], (
        "Ray is started on a head that has none"
    )
    assert "the password has 9 letters" in capsys.readouterr().out
    assert "hush" not in json.dumps(head.asked("/api/jobs/"))
    assert not (head.home / ".paretovl-secret.env").exists()


@pytest.mark.parametrize(
    ("state", "jobs", "done"),
    [
        ("up", [Job("paretovl-x-1", "FAILED")], ["ray up --no-restart"]),
        ("up", [Job("paretovl-x-1", "FAILED"), Job("paretovl-y-1", "PENDING")], []),
        ("up", [Job(None, "RUNNING")], []),
        ("foreign", [], []),
    ],
)
def test_nothing_that_runs_is_touched(
    state: State, jobs: list[Job], done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study.submit, "surroundings", fine)
    launcher = Recorded(NOWHERE)
    request = described([], None, {}, launcher.config)
    submission = Submission(None, request, "again", launcher, may_update=state == "up")  # type: ignore[arg-type]  # asks no server
    submission.update(jobs)
    assert launcher.done == done


def test_nothing_is_brought_up_to_be_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study.submit, "surroundings", fine)
    launcher = Recorded(NOWHERE, "absent")
    assert over_ssh(launcher, True, described([], None, {}, launcher.config), "again") == 0
    assert launcher.done == []
    assert "nothing of study quickstart runs" in capsys.readouterr().out


def test_a_file_that_would_not_do_is_refused_before_anything_is_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.submit, "surroundings", fine)
    launcher = Recorded(NOWHERE, "absent")
    launcher.config["auth"]["ssh_user"] = "FILL-IN"
    with pytest.raises(InputError, match=r"auth\.ssh_user: still FILL-IN"):
        over_ssh(launcher, False, described([], None, {}, launcher.config), "again")
    assert launcher.done == []


@pytest.mark.parametrize("lacks", ["key", "ssh"])
def test_nobody_is_asked_where_nobody_could_be(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(config: dict[str, Any]) -> Surroundings:
        return replace(fine(config), **{"key": {"files": frozenset()}, "ssh": {"programs": frozenset()}}[lacks])

    monkeypatch.setattr(study.submit, "surroundings", here)
    launcher = Recorded(NOWHERE)  # has no state to tell
    message = {"key": "ssh_private_key: ~/.ssh/id_ed25519 is not here", "ssh": "ssh and rsync: not found"}[lacks]
    with pytest.raises(InputError, match=message):
        over_ssh(launcher, False, described([], None, {}, launcher.config), "again")
