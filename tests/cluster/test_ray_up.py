"""Real `ray up` of own machines, made of namespaces: one is cut off, one is drained, the head is restarted."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from study.clusters.files.local import Settings, render
from tests.chaos.table import Tell
from tests.chaos.test_cluster import all_accounted_for, ended, open_attempt, two_workers, under_way
from tests.chaos.test_kill_and_resume import Driver
from tests.chaos.test_real import another_rung, entries, outcome, wait_for
from tests.cluster.hosts import ROOT, SHARED, Host, Hosts, lacking

pytestmark = pytest.mark.chaos

PATIENCE_SECONDS = 600.0
"""For what takes Ray seconds, on a busy machine."""

PLACE = "--num-cpus=2 --object-store-memory=100000000"
"""Of every machine, whatever this one has: one of a trial's two workers fits on it."""
PATIENCE = (
    "RAY_worker_register_timeout_seconds=900",  # on a busy machine
    "RAY_gcs_rpc_server_reconnect_timeout_s=20",  # after `ray down`; else 60, for which the test would wait
)


def cluster_file(hosts: Hosts) -> str:
    """As a user has it written; but the environment is there, and each machine says that it is a small one."""
    head, *workers = (host.address for host in hosts.hosts)
    settings = Settings(
        head=head, workers=tuple(workers), user="root", ssh_key=str(hosts.key), shared=SHARED, cache=Path("/tmp/cache")
    )
    written = yaml.safe_load(render(settings))
    assert written["setup_commands"]
    for kind in ("head", "worker"):
        commands = written[f"{kind}_start_ray_commands"]
        commands[-1] = commands[-1].replace("ray start", f"ray start {PLACE}")
        commands[-1] = f"export {' '.join(PATIENCE)}; {commands[-1]}"
    return yaml.safe_dump({**written, "setup_commands": []})


class Own(Driver):
    """A study that is submitted from the laptop to a cluster of own machines.

    Attributes:
        hosts: the machines, whose head is the first.
        seconds: that things took.
    """

    def __init__(self, hosts: Hosts, **fields: Any) -> None:
        super().__init__(hosts.shared, **fields)
        self.hosts, self.seconds = hosts, dict[str, float]()
        self.file = hosts.shared / "cluster.yaml"
        self.file.write_text(cluster_file(hosts))
        self.head = hosts.hosts[0]
        hosts.laptop.run("ray", "get-auth-token", "--generate")

    def timed(self, what: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        found = work()
        self.seconds[what] = time.monotonic() - began
        return found

    def ray(self, verb: str, *flags: str) -> str:
        """A command of Ray's launcher, typed on the laptop."""
        return self.hosts.laptop.run("env", f"--chdir={ROOT}", "ray", verb, "--yes", str(self.file), *flags)

    def on_head(self, *words: str) -> str:
        return self.head.run("env", "RAY_AUTH_MODE=token", *words)

    def start(self, *flags: str) -> subprocess.Popen[str]:
        """Submits the study unless it runs, and follows it; whatever becomes of that, it goes on."""
        return self.hosts.laptop.start(
            *("python", "-m", "study.submit", "--cluster", str(self.file)),
            *("--config", str(self.folder / "config.yaml"), "--name", "chaos", *flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def there(self, count: int) -> bool:
        """Whether Ray has so many machines."""
        try:
            return f"/{2.0 * count:.1f} CPU" in self.on_head("ray", "status")
        except RuntimeError:  # the head starts
            return False

    def of_the_trial(self) -> tuple[Host, str]:
        """A machine with a worker of the trial that is under way, and Ray's name for it."""
        attempt = open_attempt(self)
        assert attempt is not None
        names = dict(place.split() for place in attempt["nodes"])
        assert len(names) == 2, "both workers on one machine"
        return next((host, names[host.name]) for host in self.hosts.hosts[1:] if host.name in names)


def patiently(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.5)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if why := lacking():
        pytest.skip(why)
    folder = tmp_path / "hosts"
    folder.mkdir()
    with Hosts(folder) as made:
        yield made


def cut_off(own: Own, process: subprocess.Popen[str]) -> None:
    """A cable is pulled, and put in again when the trial has gone on without that machine."""
    host, _ = own.of_the_trial()
    tries = len(ended(own))
    began = time.monotonic()
    own.hosts.cut(host)
    assert wait_for(lambda: len(ended(own)) > tries, process)
    own.seconds["until the cut was noticed"] = time.monotonic() - began
    assert wait_for(lambda: under_way(own), process)
    own.seconds["until the trial went on"] = time.monotonic() - began
    own.hosts.plug(host)
    own.timed("until the machine was back", lambda: patiently(lambda: own.there(3)))


@contextmanager
def suspended(host: Host) -> Iterator[None]:
    """Within, the trial waits: or it might be over before what takes Ray's own processes long."""
    host.run("pkill", "--signal", "STOP", "--full", "^ray::RayTrainWorker")
    yield
    host.run("pkill", "--signal", "CONT", "--full", "^ray::RayTrainWorker")


def drained(own: Own, process: subprocess.Popen[str]) -> None:
    """A machine will be taken away, is, and comes back."""
    host, node = own.of_the_trial()
    tries = len(ended(own))
    with suspended(host):
        own.on_head(
            *("ray", "drain-node", f"--address={own.head.address}:6379", f"--node-id={node}", "--reason-message=spot"),
            *("--reason=DRAIN_NODE_REASON_PREEMPTION", f"--deadline-remaining-seconds={PATIENCE_SECONDS:.0f}"),
        )
        assert wait_for(lambda: any("ray::PreemptionWatcher" in one for one in own.head.processes()), process)
    began = time.monotonic()
    assert wait_for(lambda: len(ended(own)) > tries, process)
    own.seconds["until the drained machine was left"] = time.monotonic() - began
    host.run("ray", "stop", "--force")
    assert wait_for(lambda: under_way(own), process)
    own.seconds["until the trial went on elsewhere"] = time.monotonic() - began
    own.timed("until that machine was back", lambda: patiently(lambda: own.there(3)))


def head_restarted(own: Own, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """`ray up` again: with --no-restart nothing happens to the study, without it Ray and what runs there end."""
    tries = len(ended(own))
    host, _ = own.of_the_trial()
    with suspended(host):
        own.timed("ray up --no-restart", lambda: own.ray("up", "--no-restart"))
    assert another_rung(own, process)
    assert len(ended(own)) == tries
    own.timed("ray up, again", lambda: own.ray("up"))
    own.output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0, "the study outlived Ray"
    own.timed("the other machines, again", lambda: patiently(lambda: own.there(3)))
    return own.start()


@pytest.mark.timeout(3600)
def test_own_machines(tmp_path: Path, hosts: Hosts, long_chaos: bool, tell: Tell) -> None:
    done = ["cut off", "drained", "head restarted"] if long_chaos else ["cut off"]
    points, epochs = (2, 80) if long_chaos else (1, 10)
    (tmp_path / "whole").mkdir()
    whole = Driver(tmp_path / "whole", **two_workers(points, epochs, 1.0))
    budget = {"trials": points, "max_failures": len(done)}
    own = Own(hosts, **{**two_workers(points, epochs, 1.3), "budget": budget})
    undisturbed = whole.start()

    own.timed("ray up", lambda: own.ray("up"))
    own.timed("the other machines", lambda: patiently(lambda: own.there(3)))
    began = time.monotonic()
    process = own.start()
    assert another_rung(own, process), process.communicate()[0]
    assert wait_for(lambda: under_way(own), process)
    cut_off(own, process)
    if long_chaos:
        drained(own, process)
        process = head_restarted(own, process)
    own.output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, own.output
    own.seconds["the study"] = time.monotonic() - began
    print({what: round(seconds, 1) for what, seconds in own.seconds.items()})
    causes = [attempt["cause"] for attempt in ended(own) if attempt["cause"] != "complete"]
    if long_chaos:  # the driver may see how Ray stops its trial, before it is stopped itself
        assert causes.pop() in ("infrastructure", "interrupted")
        assert causes.pop() == "preempted"
    assert causes == ["infrastructure"]
    all_accounted_for(own)

    whole.output, _ = undisturbed.communicate(timeout=1200)
    assert undisturbed.returncode == 0, whole.output
    found, expected = outcome(own), outcome(whole)
    for what in done:
        tell(f"own machines: {what}", 1, entries(found), entries(expected), found == expected)
    assert found == expected

    own.timed("ray down", lambda: own.ray("down"))
    own.timed("until nothing was left", lambda: patiently(lambda: not any(host.processes() for host in hosts.hosts)))
    print({what: round(seconds, 1) for what, seconds in own.seconds.items()})
