"""How the workers of a trial meet, and who need not know of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trainables.execution import process_group as module
from trainables.execution.process_group import meet_by_network_of_ray


@pytest.mark.parametrize(("given", "used"), [({}, "lo"), ({"GLOO_SOCKET_IFNAME": "eth7"}, "eth7")])
def test_workers_meet_where_ray_has_their_nodes(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], used: str
) -> None:
    monkeypatch.setattr(module, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(os, "environ", dict(given))
    meet_by_network_of_ray()
    assert os.environ == {"GLOO_SOCKET_IFNAME": used}


def test_the_processes_that_wait_for_workers_do_without_pytorch() -> None:
    code = "import sys, trainables.trial, trainables.execution.attempt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
