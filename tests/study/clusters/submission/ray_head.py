"""A real head of Ray with its job server, on this machine. What its jobs run stands in for a study."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

TOKEN = "0123456789abcdef" * 3
WAIT_SECONDS = 120

STAND_IN = """
import os, signal, sys, time
from pathlib import Path

name = sys.argv[sys.argv.index("--name") + 1]
typed = "--studies-dir" in sys.argv
studies = sys.argv[sys.argv.index("--studies-dir") + 1] if typed else os.environ["PARETOVL_STUDIES_DIR"]
folder = Path(studies) / name
folder.mkdir(exist_ok=True)

def stop(*_):
    time.sleep(4)  # longer than Ray would wait by itself
    print("stopped in order", flush=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
print("begun with", os.environ["RAY_AUTH_MODE"], *sys.argv[1:], flush=True)
print("the password has", len(os.environ.get("PARETOVL_STORAGE", "").partition("me:")[2].partition("@")[0]), "letters")
for number in range(3000):
    print("line", number, "x" * (number % 50), flush=number % 100 == 99)
    while number == 1500 and not (folder / "go").exists():
        time.sleep(0.05)
print("the last line")
code = int((folder / "go").read_text())
(folder / "go").unlink()
sys.exit(code)
"""
"""A study that waits in the middle of its log for the code it is to end with."""

PYTHON = """#!/bin/sh
[ "$2" = study.run ] && {{ shift 2; exec {python} {stand_in} "$@"; }}
[ "$2$4" = study.exports ] || {{ echo "there is no study"; exit 2; }}
exec {python} "$@"
"""
"""What the head has as `python`: studies are stood in for, and s is one that can be exported."""


@dataclass(frozen=True)
class Head:
    """A head with its job server."""

    port: int
    studies: Path
    followers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.studies.parent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def jobs(self, name: str) -> list[str]:
        found = [job["submission_id"] for job in self.asked("/api/jobs/")]
        return sorted(job for job in found if job.startswith(f"paretovl-{name}-") and "-results-" not in job)

    def go(self, name: str, code: int) -> None:
        """Let the study go on, to this end."""
        part = self.studies / name / "part"
        part.write_text(str(code))
        part.rename(self.studies / name / "go")


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def running(folder: Path) -> Iterator[Head]:
    """A head that has started, with this folder as its home."""
    (folder / "stand_in.py").write_text(STAND_IN)
    (folder / "python").write_text(PYTHON.format(python=sys.executable, stand_in=folder / "stand_in.py"))
    (folder / "python").chmod(0o700)
    (folder / "studies").mkdir()
    ports = free_ports(3)
    short = tempfile.mkdtemp(prefix="head-", dir="/tmp")  # a path of a socket has at most 107 characters
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # or every worker would make an environment of its own
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(folder),
    }
    options = ["--num-cpus=2", "--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0", f"--temp-dir={short}"]
    options += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
    options += ["--min-worker-port=0", "--max-worker-port=0"]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ray), "start", "--head", "--block", *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    made = Head(ports[1], folder / "studies")
    try:
        wait_for(lambda: process.poll() is not None or answers(made))
        assert process.poll() is None, (folder / "head.log").read_text()
        yield made
    finally:
        for follower in made.followers:
            follower.kill()  # or it would try to connect for ever
            follower.wait()
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        shutil.rmtree(short, ignore_errors=True)


def answers(head: Head) -> bool:
    with suppress(OSError):
        head.asked("/api/jobs/")
        return True
    return False


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
