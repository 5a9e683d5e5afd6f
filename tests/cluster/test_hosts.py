"""Machines made of namespaces are apart from each other and from this one, and nothing stays of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import ROOT, SHARED, Hosts, lacking


@pytest.fixture(autouse=True)
def _possible() -> None:
    if why := lacking():
        pytest.skip(why)


def machine() -> list[str]:
    """What this machine has of what others could leave behind."""
    return [*sorted(os.listdir("/sys/class/net")), *Path("/proc/self/mounts").read_text().splitlines()]


def test_each_has_processes_network_and_folders_of_its_own(tmp_path: Path) -> None:
    before = machine()
    with Hosts(tmp_path, count=2) as hosts:
        one, other = hosts.hosts
        one.run("touch", "/tmp/mine", f"{SHARED}/ours")
        assert other.run("ls", str(SHARED)) == "ours\n"
        assert "mine" not in other.run("ls", "/tmp")
        assert one.processes() == other.processes() == []
        login = [f"-i{hosts.key}", "-oStrictHostKeyChecking=no", "-oConnectTimeout=1", other.address, "hostname; nproc"]
        assert "host2" in hosts.laptop.run("ssh", *login)
        hosts.cut(other)
        with pytest.raises(RuntimeError, match="ssh"):
            hosts.laptop.run("ssh", *login)
        hosts.plug(other)
        assert "host2" in hosts.laptop.run("ssh", *login)
        assert machine() == before
    assert machine() == before


def test_nothing_stays_where_the_test_is_killed(tmp_path: Path) -> None:
    before = machine()
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.cluster.hosts import Hosts
with Hosts(Path({str(tmp_path)!r}), count=1) as hosts:
    print(hosts.laptop.init.pid, hosts.hosts[0].init.pid, flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    inits = [int(word) for word in child.stdout.readline().split()]
    assert len(inits) == 2
    everything = [process for init in inits for process in psutil.Process(init).children(recursive=True)]
    assert everything
    child.kill()
    child.communicate()
    end = time.monotonic() + 30
    while any(process.is_running() for process in everything) or any(map(psutil.pid_exists, inits)):
        assert time.monotonic() < end, [process for process in everything if process.is_running()]
        time.sleep(0.05)
    assert machine() == before
