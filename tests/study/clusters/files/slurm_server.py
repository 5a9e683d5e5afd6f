"""Slurm on this machine for a test: its own key, ports and folders; several nodes, which all are this machine."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
ReturnToService=2
MailProg=/bin/true
{nodes}
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs of Slurm that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Slurm:
    """A controller, a daemon for each of two nodes with one core, and their key server.

    Args:
        root: a new folder, with a short path, as sockets are below it.
    """

    def __init__(self, root: Path) -> None:
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._root = root
        root.chmod(0o755)  # the key server's socket is for everyone
        (root / "munge").mkdir(mode=0o711)
        (root / "state").mkdir()
        key = root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host, (controller, *ports) = socket.gethostname(), free_ports(3)
        names = [f"node{place + 1}" for place in range(len(ports))]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1"
            for name, port in zip(names, ports, strict=True)
        ]
        (root / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host, controller=controller, user=getpass.getuser(), root=root, nodes="\n".join(nodes)
            )
        )
        munge = [f"--{name}-file={root}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        self._commands = [
            ["munged", "--foreground", f"--socket={root}/munge/socket", *munge],
            ["slurmctld", "-D", "-c"],
        ]
        for name in names:
            (root / f"spool-{name}").mkdir()
            self._commands.append(["slurmd", "-D", "-N", name])

    def start(self) -> None:
        """Begin; returns when jobs can run.

        Raises:
            TimeoutError: they cannot.
        """
        for place, command in enumerate(self._commands):
            with (self._root / f"{place}-{command[0]}.log").open("wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        self.until(lambda: self.run("sinfo", "-h", "-p", "usual", "-o", "%T %D") == "idle 2", 60)

    def stop(self) -> None:
        """End all jobs and daemons."""
        self.run("scancel", f"--user={getpass.getuser()}")
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait(30)

    def run(self, *command: str) -> str:
        """What a program of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip()

    def submit(self, *command: str | Path) -> str:
        """By sbatch. Returns the job's number."""
        return self.run("sbatch", "--parsable", *map(str, command))

    def state(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, such as JobState, Restarts and ExitCode."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, happened: Callable[[], bool], seconds: float) -> None:
        """Wait until something has happened.

        Raises:
            TimeoutError: it has not.
        """
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end:
                ends = [f"{log.name}: {log.read_text()[-500:]}" for log in sorted(self._root.glob("*.log"))]
                raise TimeoutError("\n".join([self.run("scontrol", "show", "job"), self.run("sinfo"), *ends]))
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """On this machine."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
