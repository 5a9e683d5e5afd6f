"""What this machine does with a cluster through Ray's launcher: bring it up, ask how it stands, reach it.

Ray's launcher prints, changes the terminal and reads paths from where it stands, so each call is a process of its own.
Its private API is used in the lower half of this file and nowhere else: the public one cannot ask a head that is not
set up completely, nor forward a port to another.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import study
from study.clusters.checks.launcher_schema import misshapen, read_cluster
from study.clusters.files.common import DASHBOARD_PORT
from trainables.errors import Away, InputError

TUNNEL_SECONDS = 60.0
"""That a connection over ssh may take."""

State = Literal["absent", "down", "up", "foreign"]
"""Of a cluster: without a head; with one on which Ray does not run, or runs; or runs and was brought up elsewhere."""


class Launcher:
    """A cluster by its file.

    Args:
        file: for Ray's launcher.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file.resolve()
        self.config = read_cluster(self.file)
        if found := list(misshapen(self.config)):
            raise InputError("\n  ".join([f"{self.file}:", *found]))
        self._port: int | None = None
        self._tunnel: subprocess.Popen[bytes] | None = None

    def state(self) -> State:
        """How it stands, as the head itself says.

        Raises:
            Away: there is a head, and it does not say.
            InputError: the cloud does not know who asks.
        """
        done = self._call("state", capture=True)
        words = done.stdout.decode(errors="replace").split()
        found: State
        for found in ("absent", "down", "foreign", "up"):
            if done.returncode == 0 and words[-1:] == [found]:
                return found
        said = done.stdout.decode(errors="replace")
        if nobody := re.search(KNOWS_NOBODY, said, flags=re.M):
            raise InputError(f"AWS: {nobody[1]}; give this machine keys that count with `aws configure`, or sign in")
        raise Away(f"the head of {self.file} does not answer over ssh: {_reason(said)}")

    def up(self, restart: bool = False) -> None:
        """Bring the cluster up, or bring files and settings there up to date.

        Args:
            restart: stop Ray on a head that is there, and with it all that runs.

        Raises:
            Away: it failed, which may be for now; Ray has said why.
        """
        if self._call("up", "restart" if restart else "no-restart").returncode:
            raise Away(f"`ray up` of {self.file} failed for the reason above; the same command tries again")

    def put(self, text: str, target: str) -> None:
        """Make a file on the head that its user alone may read.

        Raises:
            Away: it failed.
        """
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as made:  # mode 0600, which rsync keeps
            made.write(text)
            made.flush()
            done = self._call("put", made.name, target, capture=True)
        if done.returncode:
            said = done.stdout.decode(errors="replace")
            raise Away(f"nothing can be copied to the head of {self.file}: {_reason(said)}")

    def address(self) -> str:
        """Where this machine finds the job server, once `connect` has made a way there."""
        if self._port is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._port = free.getsockname()[1]
        return f"http://127.0.0.1:{self._port}"

    def connect(self) -> None:
        """Make the way to the job server, unless there is one. Whoever asks there finds out whether it is of use."""
        self.address()
        if self._tunnel is not None and self._tunnel.poll() is None:
            return
        self._tunnel = self._start("tunnel", str(self._port), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        end = time.monotonic() + TUNNEL_SECONDS
        while self._tunnel.poll() is None and time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port or 0), 1):
                return
            time.sleep(0.2)
        self.disconnect()

    def disconnect(self) -> None:
        """End the way to the job server."""
        if self._tunnel is not None:
            if self._tunnel.stdin is not None:
                self._tunnel.stdin.close()  # it ends with whoever holds this, however that one ends
            self._tunnel.wait()

    def _call(self, *what: str, capture: bool = False) -> subprocess.CompletedProcess[bytes]:
        stdout, stderr = (subprocess.PIPE, subprocess.STDOUT) if capture else (None, None)
        process = self._start(*what, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        output, _ = process.communicate()
        return subprocess.CompletedProcess(what, process.returncode, output or b"")

    def _start(self, operation: str, *given: str, **streams: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "study.clusters.submission.launcher", operation, str(self.file), *given]
        environment = {"RAY_USAGE_STATS_ENABLED": "0", **os.environ}
        return subprocess.Popen(command, cwd=folder_of(self.config, self.file), env=environment, **streams)


PROJECT = Path(study.__file__).parents[1]


def folder_of(config: Mapping[str, Any], file: Path) -> Path:
    """Where most paths of a cluster file lead to something: here, beside the file, or in the project."""

    def found(folder: Path) -> int:
        mounts = (config.get("file_mounts") or {}).values()
        return sum((folder / Path(mount).expanduser()).exists() for mount in mounts)

    return max(Path.cwd(), file.parent, PROJECT, key=found)


KNOWS_NOBODY = (
    r"^botocore\.exceptions\.((?:NoCredentials|PartialCredentials|CredentialRetrieval|ProfileNotFound|\w*Token\w*|\w*SSO|"
    r"ClientError: .*\((?:AuthFailure|InvalidClientTokenId|UnrecognizedClientException|\w*Expired\w*)\)).*)"
)
"""What boto3 says where this machine has no keys, or none that count: trying again is of no use."""
LONGEST_REASON = 200
"""Characters; Ray ends with the whole command that failed."""


def _reason(said: str) -> str:
    """The line that says most: ssh's own, or the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it says nothing"]
    of_ssh = [line for line in lines if re.match(r"ssh: |\S+: Permission denied|Host key verification|kex_", line)]
    return textwrap.shorten((of_ssh or lines)[-1], LONGEST_REASON, placeholder=" ...")


# What follows runs in a process of its own, with Ray.

ASK = "if cat /proc/[0-9]*/comm 2>/dev/null | grep -qx gcs_server; then echo ray-is-up; else echo ray-is-down; fi"


def _state(file: str) -> None:
    from ray.autoscaler._private import commands

    adopted = _adopt(file)
    try:
        said = commands.exec_cluster(file, cmd=ASK, with_output=True, _allow_uninitialized_state=True)
    except RuntimeError as error:
        if "not found" not in str(error):
            raise
        print("\nabsent")
        return
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    if "ray-is-up" in text:
        print("\nforeign" if adopted else "\nup")
    else:
        print("\ndown" if "ray-is-down" in text else f"\n{text}")


def _adopt(file: str) -> bool:
    """Own machines are there whether or not this one has brought the cluster up; Ray only knows what it did itself.

    Returns:
        Whether it was brought up from another machine, or before this one forgot; `ray up` would restart it.
    """
    import yaml
    from ray.autoscaler._private import commands
    from ray.autoscaler._private.local.node_provider import LocalNodeProvider, record_local_head_state_if_needed
    from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG

    config = commands._bootstrap_config(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    provider = commands._get_node_provider(config["provider"], config["cluster_name"])
    if not isinstance(provider, LocalNodeProvider):
        return False
    record_local_head_state_if_needed(provider)
    return TAG_RAY_LAUNCH_CONFIG not in provider.node_tags(config["provider"]["head_ip"])


def _up(file: str, how: str) -> None:
    from ray.autoscaler.sdk import create_or_update_cluster

    create_or_update_cluster(file, no_restart=how == "no-restart")


def _put(file: str, source: str, target: str) -> None:
    from ray.autoscaler.sdk import rsync

    rsync(file, source=source, target=target, down=False)


def _tunnel(file: str, port: str) -> None:
    from ray.autoscaler._private import commands

    os.setsid()

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os.killpg(0, signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    commands.exec_cluster(file, port_forward=[(int(port), DASHBOARD_PORT)], _allow_uninitialized_state=True)


OPERATIONS: dict[str, Callable[..., None]] = {"state": _state, "up": _up, "put": _put, "tunnel": _tunnel}

if __name__ == "__main__":
    OPERATIONS[sys.argv[1]](*sys.argv[2:])
