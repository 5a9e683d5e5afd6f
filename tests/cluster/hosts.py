"""Machines made of namespaces, each with network, processes, `/tmp`, home and sshd of its own; and a laptop.

All of it lives in one outer namespace of processes, which the kernel ends with the process that made it, however that
ends: nothing of it can stay behind, and the network of this machine is never touched. The machines share this one's
disk outside `OWN`, and one folder, at `/mnt`, as if by NFS.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

SHARED = Path("/mnt")
"""On every machine but the laptop: one folder for all."""

LAPTOP = "10.77.0.1"
HOME = Path(pwd.getpwuid(os.getuid()).pw_dir)
ROOT = Path(__file__).resolve().parents[2]
PATH = f"{Path(sys.prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"HOME": str(HOME), "PATH": PATH, "COLUMNS": "200"}

PROGRAMS = {"ssh": "openssh-client", "sshd": "openssh-server", "rsync": "rsync", "ip": "iproute2"}
"""What is needed, and Debian's packages that have it."""

UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")

OWN = ("/tmp", "/run", "/dev/shm", str(HOME))
"""Folders that every machine has for itself, with nothing in them but what a test needs of this machine."""

BEGIN = f"""set -e
own() {{  # but for folders of this machine
    mount -t tmpfs tmpfs /mnt
    for folder in {" ".join(OWN)}; do mkdir -p /mnt$folder; done
    for kept in "$@"; do mkdir -p /mnt$kept; mount --rbind $kept /mnt$kept; done
    for folder in {" ".join(OWN)}; do mount --rbind /mnt$folder $folder; done
    umount --lazy /mnt
    chmod 1777 /tmp /dev/shm
    mkdir -p -m 700 {HOME}/.ssh {HOME}/.ray
    mkdir -p /run/sshd
    echo 'export PATH={PATH}' > {HOME}/.bashrc
    ln -s {sys.prefix} {HOME}/venv  # where a cluster's nodes have the project's environment
}}
stay() {{ echo ready; exec >/dev/null; sleep infinity & while :; do wait -n; done; }}  # and bury orphans, as init does
ip link set lo up
"""


def lacking() -> str | None:
    """Why there can be no such machines here; None if there can."""
    if missing := sorted(package for program, package in PROGRAMS.items() if shutil.which(program, path=PATH) is None):
        return f"machines of namespaces need {', '.join(missing)}: apt-get install {' '.join(missing)}"
    if sys.platform != "linux" or shutil.which("unshare", path=PATH) is None:
        return "machines of namespaces need Linux, and util-linux"
    tried = subprocess.run([*UNSHARE, "sh", "-c", "mount -t tmpfs tmpfs /mnt && ip link add one type bridge"],
                           capture_output=True, text=True)  # fmt: skip
    if tried.returncode:
        return f"machines of namespaces need root's rights to make them: {tried.stderr.strip().splitlines()[-1]}"
    return None


class Host:
    """A machine.

    Args:
        name: its own.
        address: in the network of the machines.
        starter: says that it is ready.

    Attributes:
        init: its first process.
    """

    def __init__(self, name: str, address: str, starter: subprocess.Popen[str]) -> None:
        self.name, self.address = name, address
        assert starter.stdout is not None
        if starter.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name} did not start: {starter.communicate()[1]}")
        below = psutil.Process(starter.pid).children(recursive=True)
        (self.init,) = [process for process in below if _numbers(process)[-1] == "1"]

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command there."""
        within = ["nsenter", "--target", str(self.init.pid), "--all", "--wdns=/tmp", *words]
        return subprocess.Popen(within, text=True, env=ENVIRONMENT, stdin=subprocess.DEVNULL, **options)

    def run(self, *words: str) -> str:
        """Run a command there, with what it prints.

        Raises:
            RuntimeError: it failed.
        """
        process = self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{self.name}: {shlex.join(words)}: {output}")
        return output

    def processes(self) -> list[str]:
        """What runs there, besides its first process, sshd and what only waits."""
        listed = self.run("ps", "-e", "-o", "pid=,stat=,comm=,args=").splitlines()
        found = [line.split(maxsplit=3) for line in listed]
        mine = ("ps", "sshd", "sshd-session", "sshd-auth", "sleep")
        return [words[-1] for words in found if words[0] != "1" and words[1][0] != "Z" and words[2] not in mine]


def _numbers(process: psutil.Process) -> list[str]:
    """Of a process, in every namespace from this one to its own."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return [""]
    return next(line.split() for line in lines if line.startswith("NSpid:"))[1:]


class Hosts:
    """A context manager: the machines are there within.

    Args:
        folder: for keys, and for what the machines share.
        count: of machines beside the laptop.

    Attributes:
        laptop: where commands are typed. It has the key of the others.
        hosts: in the order of their addresses.
        key: of ssh, on the laptop.
        shared: the folder that is `SHARED` on the others.
    """

    def __init__(self, folder: Path, count: int = 3) -> None:
        self._folder, self._count = folder, count
        self.key, self.shared = folder / "key", folder / "shared"

    def __enter__(self) -> Hosts:
        self.shared.mkdir()
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._folder / name], check=True)
        (self._folder / "sshd_config").write_text(
            f"HostKey {self._folder}/host_key\nAuthorizedKeysFile {self._folder}/key.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPidFile none\nUseDNS no\nMaxStartups 100\n"
        )
        bridge = f"ip link add bridge type bridge; ip address add {LAPTOP}/24 dev bridge; ip link set bridge up"
        self._outer = self._start(["setpriv", "--pdeathsig", "KILL"], "laptop", bridge)
        try:
            self.laptop = Host("laptop", LAPTOP, self._outer)
            self.hosts = [self._host(number) for number in range(1, self._count + 1)]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._outer.kill()
        self._outer.communicate()

    def cut(self, host: Host) -> None:
        """Pull its cable."""
        self.laptop.run("ip", "link", "set", host.name, "down")

    def plug(self, host: Host) -> None:
        """Put it in again."""
        self.laptop.run("ip", "link", "set", host.name, "up")

    def _host(self, number: int) -> Host:
        name, address = f"host{number}", f"10.77.0.{10 + number}"
        with open(f"/proc/{self.laptop.init.pid}/ns/net") as network:
            there = f"nsenter --net=/proc/self/fd/{network.fileno()} ip link"
            then = (
                f"mount --bind {self.shared} {SHARED}\n"
                f"{there} add {name} type veth peer name eth0 netns 1; {there} set {name} master bridge up\n"
                f"ip address add {address}/24 dev eth0; ip link set eth0 up; ip route add default via {LAPTOP}\n"
                f"$(command -v sshd) -f {self._folder}/sshd_config"
            )
            within = ["nsenter", "--target", str(self.laptop.init.pid), "--all"]
            return Host(name, address, self._start(within, name, then, pass_fds=(network.fileno(),)))

    def _start(self, within: list[str], name: str, then: str, **options: Any) -> subprocess.Popen[str]:
        names, script = self._folder / f"{name}-hosts", self._folder / f"{name}.sh"
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")  # as Debian has it: itself is on loopback
        kept = {str(path) for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix), self._folder)}
        below = sorted(path for path in kept if any(Path(path).is_relative_to(folder) for folder in OWN))
        script.write_text(
            f"{BEGIN}hostname {name}\nown {shlex.join(below)}\nmount --bind {names} /etc/hosts\n{then}\nstay\n"
        )
        return subprocess.Popen(
            [*within, *UNSHARE, "bash", str(script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            **options,
        )
