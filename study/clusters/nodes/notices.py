"""`python -m study.clusters.nodes.notices`: tell Ray when the cloud is about to take this machine away.

On a node of a Ray cluster it asks the metadata server of AWS or GCP every second. A notice of the machine's end
becomes a drain of the node with the same deadline: trials there write a checkpoint and go on elsewhere. Without it, or
where it fails, a trial goes on from its last checkpoint.

It finds the cloud and the node by itself, may be started before Ray, waits where the metadata server or Ray's head are
away, and ends with the node. It holds some 20 MB: nothing but the standard library and psutil, and Ray only for the
drain, in a process of its own.

A node starts it after Ray, in a session of its own, so that the shell that started it is not kept; a second one for the
same node ends at once:

  setsid -f python -m study.clusters.nodes.notices < /dev/null >> /tmp/ray/notices.log 2>&1

GCP presses the power button of a spot machine together with the notice, unless `scheduling.preemptionNoticeDuration`
says otherwise; its system would end all processes at once. So its nodes ignore that button (`HandlePowerKey=ignore` in
/etc/systemd/logind.conf.d/) and are switched off half a minute later.

Where something else knows of the end, a Slurm job that is signalled or the owner of a machine, say so there with
`--leaves-in`.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from study.clusters.nodes.metadata import Aws, Cloud, Gcp, NoAnswer, Notice
from trainables.errors import InputError

POLL_SECONDS = 1.0
"""Between two questions to the metadata server. AWS advises five at most; on GCP each of thirty counts."""

LONGEST_SECONDS = 15.0
"""The same while the server is away: less than any notice."""

DETECTION_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Before each try to find the cloud: a machine's network may come after its first programs."""

RAY_SECONDS = 900.0
"""Ray may start later than this program."""

DRAIN_SECONDS = 15.0
"""For one try to drain."""

YEAR_SECONDS = 3e7
"""Nobody says earlier that a machine leaves."""

LEAST_SECONDS = 10.0
"""To a deadline that Ray is told. It ends trials there at the deadline, so one that has passed would leave no time to
those that can still write."""


@dataclass(frozen=True)
class Node:
    """Ray on this machine.

    Attributes:
        process: Ray's agent, the raylet.
        id: Ray's, in hexadecimal.
        head: host:port.
        session: folder of Ray's session.
    """

    process: psutil.Process
    id: str
    head: str
    session: Path

    def alive(self) -> bool:
        """Whether Ray still runs here."""
        try:
            return bool(self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def environment(self) -> dict[str, str]:
        """Of Ray: what makes it known to the head, such as a token, is there."""
        try:
            return dict(self.process.environ())
        except psutil.Error:  # another user's
            return dict(os.environ)


def local_nodes() -> list[Node]:
    """Of Ray, on this machine; several only in tests."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and process.info["cmdline"]:
            flags = dict(part.lstrip("-").split("=", 1) for part in process.info["cmdline"][1:] if "=" in part)
            found.append(Node(process, flags["node_id"], flags["gcs-address"], Path(flags["session_dir"])))
    return found


def this_node(wanted: str | None) -> Node | None:
    """Ray on this machine; None if it does not run.

    Args:
        wanted: its id, where there are several.

    Raises:
        InputError: there are several, and none is named.
    """
    found = [node for node in local_nodes() if wanted in (None, node.id) and node.alive()]
    if len(found) > 1:
        ids = ", ".join(node.id for node in found)
        raise InputError(f"--node-id: several nodes of Ray run on this machine; give one of {ids}")
    return found[0] if found else None


def drain(node: Node, notice: Notice) -> str:
    """Tell Ray. Returns why it did not work; empty if it did."""
    deadline = max(notice.deadline, time.time() + LEAST_SECONDS)
    told = [node.head, node.id, str(int(deadline * 1000)), notice.reason]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "study.clusters.nodes.drain", *told],
            env=node.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DRAIN_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"Ray's head {node.head} does not answer"
    lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
    return lines[-1] if done.returncode else ""


def cloud_here(
    clouds: Sequence[Cloud], waits: Sequence[float] = DETECTION_SECONDS, pause: Callable[[float], None] = time.sleep
) -> Cloud | None:
    """The one that answers; None if none does."""
    for wait in waits:
        pause(wait)
        for cloud in clouds:
            with suppress(NoAnswer):
                if cloud.there():
                    return cloud
    return None


def watch(
    cloud: Cloud,
    alive: Callable[[], bool],
    drained: Callable[[Notice], str],
    say: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Ask until there is a notice and Ray was told of it, or Ray has ended here.

    What is said is said once, until it changes. A notice that is withdrawn before Ray was told is forgotten.

    Args:
        cloud: that is asked.
        alive: whether Ray runs here.
        drained: tells Ray; see `drain`.
        say: writes a line.
        pause: waits for seconds.
    """
    notice: Notice | None = None
    away = failed = ""
    wait = POLL_SECONDS
    while alive():
        try:
            told = cloud.notice(time.time())
        except NoAnswer as error:
            if not away:
                say(f"{error}; it is asked again")
            away, wait = str(error), min(2 * wait, LONGEST_SECONDS)
        else:
            if away:
                say(f"{cloud.name} answers again")
            if told is None and notice is not None:
                say("the notice was withdrawn")
            if told is None or notice is None:  # the first one's deadline holds
                notice = told
            away, wait = "", POLL_SECONDS
        if notice is not None:
            began = time.time()
            problem = drained(notice)
            if not problem:
                left, took = notice.deadline - time.time(), time.time() - began
                say(f"{notice.reason}, {left:.0f} s from now: Ray was told within {took:.1f} s, its trials move")
                return
            if problem != failed:
                say(f"{notice.reason}, but Ray cannot be told: {problem}; it is tried again")
            failed, wait = problem, POLL_SECONDS
        pause(wait)
    say("Ray has ended on this machine, and so does its watcher")


def wait_for_ray(wanted: str | None) -> Node | None:
    """Ray on this machine, which may be about to start; None if it does not."""
    end = time.monotonic() + RAY_SECONDS
    while (node := this_node(wanted)) is None and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return node


@contextmanager
def only_one(node: Node) -> Iterator[bool]:
    """Whether this process is the only watcher of the node; until the end of the context no other is."""
    with (node.session / f"notices-{node.id}.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def log(line: str) -> None:
    """Write a line with the time."""
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}", flush=True)


HELP = """\
Tell Ray when the cloud is about to take this machine away: AWS or GCP,
whichever answers here. Trials on it write a checkpoint and go on elsewhere.

examples:
  python -m study.clusters.nodes.notices
  python -m study.clusters.nodes.notices --leaves-in 120"""
"""Filled by hand: the formatter of the other commands would double the memory."""


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m study.clusters.nodes.notices",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--node-id", metavar="ID", help="Ray's, where several nodes of Ray run on this machine")
    parser.add_argument(
        "--leaves-in",
        metavar="SECONDS",
        type=float,
        help="ask no cloud: this machine is taken away in so many seconds; tell Ray, and end",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 where Ray could not be told, 2 for input that cannot be used."""
    given = parser().parse_args(arguments)
    try:
        if given.leaves_in is not None:
            return leave(given.node_id, given.leaves_in)
        cloud = cloud_here((Aws(), Gcp()))
        if cloud is None:
            log("neither AWS nor GCP answers on this machine: there are no notices to watch for")
            return 0
        node = wait_for_ray(given.node_id)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if node is None:
        log(f"Ray did not start on this machine within {RAY_SECONDS / 60:.0f} min: there is nothing to watch for")
        return 0
    with only_one(node) as first:
        if first:
            log(f"watching for notices of {cloud.name} for the node {node.id}")
            watch(cloud, node.alive, lambda notice: drain(node, notice), log)
        else:
            log(f"the node {node.id} has a watcher already")
    return 0


def leave(wanted: str | None, seconds: float) -> int:
    """Tell Ray that this machine is taken away, as its owner says.

    Raises:
        InputError: it cannot be in the past, and Ray has to run here.
    """
    if not 0 <= seconds < YEAR_SECONDS:
        raise InputError(f"--leaves-in: {seconds:g} is no time to come; give the seconds that are left, such as 120")
    node = this_node(wanted)
    if node is None:
        raise InputError("Ray does not run on this machine" + f" as {wanted}" * bool(wanted))
    problem = drain(node, Notice(time.time() + seconds, "its owner takes this machine away"))
    log(f"Ray cannot be told: {problem}" if problem else f"Ray was told that {node.id} leaves in {seconds:.0f} s")
    return 1 if problem else 0


if __name__ == "__main__":
    raise SystemExit(main())
