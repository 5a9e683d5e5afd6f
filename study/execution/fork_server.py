"""Worker processes forked from one that has the libraries imported already.

A trial needs half a dozen processes, and each would spend seconds of processor time importing torch, transformers and
Ray again. On the driver's own machine a server process imports them once. While Ray is started, a small script stands
for Python (`ForkServer.as_python`), so Ray starts its processes through it: for a worker, the script asks the server
for a fork and waits for its end; for anything else, and where the server cannot be reached, it becomes Python, so the
worst case is what Ray does anyway. Ray's own first step of a worker, which imports Ray only to read a runtime
environment, is done by the script.

The server initialises no CUDA and starts no threads, so forks may use GPUs. It ends with the driver, however that ends.

As a script, with the standard library only:
    fork_server.py serve DESCRIPTOR MODULE...   the server; ends when its standard input closes
    fork_server.py start SOCKET ARGUMENT...     stands for Python in a command line of Ray
"""

from __future__ import annotations

import array
import importlib
import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MODULES = (
    *("torch", "trainables.training.finetune", "trainables.trial", "pandas", "pyarrow.fs", "aiohttp"),
    *("ray.tune", "ray.train.torch", "ray.train.v2.api.data_parallel_trainer", "ray.util.queue"),
)
"""What a trial's processes import and forks may share."""

CONTEXT = "--serialized-runtime-env-context"
"""Ray's flag with the runtime environment of a worker, as JSON."""

LARGEST = 1 << 20
"""Bytes of one request: arguments and environment as JSON."""


class ForkServer:
    """The server as a context: started on entry, gone on exit.

    Args:
        folder: for its socket and the script.
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "fork.sock")
        self._script = os.path.join(folder, "python")
        command = shlex.join([sys.executable, "-I", "-S", os.path.abspath(__file__), "start", self.path])
        with open(self._script, "w", encoding="utf-8") as script:
            script.write(f'#!/bin/sh\nexec {command} "$@"\n')
        os.chmod(self._script, 0o700)

    @contextmanager
    def as_python(self) -> Iterator[None]:
        """The script stands for Python in this process, unless nothing may be executed in the folder."""
        python = sys.executable
        if os.access(self._script, os.X_OK):
            sys.executable = self._script
        try:
            yield
        finally:
            sys.executable = python

    def __enter__(self) -> ForkServer:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(self.path)  # here, so that requests can wait for the server
            os.chmod(self.path, 0o600)
            listener.listen(128)
            self._server = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "serve", str(listener.fileno()), *MODULES],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is the driver's to handle
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def serve(descriptor: int, modules: Sequence[str]) -> None:
    """Import `modules` when the first request comes, then fork a worker for every request, until stdin closes.

    Ray's C++ side takes its settings (job, node, authentication) from the environment while it is imported. They are
    the same for all workers of a driver on a node, and the first request brings them.
    """
    listener = socket.socket(fileno=descriptor)
    _end_with_input()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended workers are reaped by the system
    imported = False
    while True:
        connection, _ = listener.accept()
        with connection:
            request, descriptors = _receive(connection)
            if request is not None and not imported:
                os.environ.update({**request["environment"], "OPENBLAS_NUM_THREADS": "1"})  # a fork keeps no threads
                sys.path[0] = os.getcwd()
                with _ids_from_the_system():
                    for module in modules:
                        importlib.import_module(module)
                if not _forks_draw_differently():
                    sys.exit("forks would draw equal ids")  # the waiting clients become workers themselves
                imported = True
            if request is not None and os.fork() == 0:
                listener.close()
                connection.sendall(b"+")
                _become(request, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


@contextmanager
def _ids_from_the_system() -> Iterator[None]:
    """Let actor classes take their ids from the system while they are declared, instead of from Ray's generator.

    A fork copies the generator. Once it is in use, all forks would draw the same ids.
    """
    import ray.actor

    original = ray.actor.ActorClassID

    class Drawn:
        @staticmethod
        def from_random() -> Any:
            return original(os.urandom(original.size()))

    ray.actor.ActorClassID = Drawn
    try:
        yield
    finally:
        ray.actor.ActorClassID = original


def _forks_draw_differently() -> bool:
    """Whether two forks get different ids from Ray's generator, as they must."""
    drawn = []
    for _ in range(2):
        out, into = os.pipe()
        if os.fork() == 0:
            from ray._raylet import UniqueID

            os.write(into, UniqueID.from_random().binary())
            os._exit(0)
        os.close(into)
        drawn.append(os.read(out, 64))
        os.close(out)
    return drawn[0] != drawn[1] and len(drawn[0]) > 0


def _end_with_input() -> None:
    """Fork a watcher that ends this process once its input is closed: a thread would not survive into the forks."""
    server = os.getpid()
    if os.fork() == 0:
        os.read(0, 1)
        os.kill(server, signal.SIGKILL)
        os._exit(0)


def _receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One request with its three standard streams; None if the client went away."""
    data, ancillary, _, _ = connection.recvmsg(LARGEST, socket.CMSG_SPACE(3 * 4))
    descriptors: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
            descriptors += numbers
    while data and not data.endswith(b"\n"):
        more = connection.recv(LARGEST)
        if not more:
            return None, descriptors
        data += more
    return (json.loads(data) if data else None), descriptors


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Turn this fork into the worker. The connection stays open until it ends, which is how the client knows."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.modules["numpy"].random.seed()
        sys.argv = list(request["arguments"])
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def worker_command(arguments: Sequence[str], environment: dict[str, str]) -> list[str] | None:
    """The worker's own command line; with what Ray's `setup_worker.py` would set, if it comes first, in `environment`.

    Returns:
        None if this is no worker, or one that asks for more than variables.
    """
    program = os.path.basename(arguments[0]) if arguments else ""
    given = dict(argument.split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
    if (
        "--gcs-address" in given
    ):  # where several Rays run on a machine, Ray Train's cleaner cannot tell which is its own
        environment.setdefault("RAY_ADDRESS", given["--gcs-address"])
    if program == "default_worker.py":  # without a runtime environment
        return list(arguments)
    if program != "setup_worker.py":
        return None
    wanted = json.loads(given.get(CONTEXT) or "{}")
    rest = [argument for argument in arguments[1:] if argument.partition("=")[0] not in (CONTEXT, "--language")]
    special = wanted.get("command_prefix") or wanted.get("override_worker_entrypoint")
    other_python = wanted.get("py_executable") not in (None, sys.executable)
    if special or other_python or not rest or not rest[0].endswith(".py"):
        return None
    for name, value in (wanted.get("env_vars") or {}).items():
        environment[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    return rest


def start(path: str, arguments: list[str]) -> None:
    """Have the server fork a worker, and stay until it ends; without a server, or for anything else, become Python."""
    environment = dict(os.environ)
    worker = worker_command(arguments, environment)
    if worker is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    request = {"arguments": worker, "environment": environment, "folder": os.getcwd()}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
        streams = socket.SCM_RIGHTS, array.array("i", [0, 1, 2])
        data = json.dumps(request).encode() + b"\n"
        sent = connection.sendmsg([data], [(socket.SOL_SOCKET, *streams)])
        connection.sendall(data[sent:])
        forked = connection.recv(1)
    except OSError:
        forked = b""
    if not forked:
        os.execve(sys.executable, [sys.executable, *worker], environment)
    connection.recv(1)


if __name__ == "__main__":
    mode, where, *rest = sys.argv[1:]
    if mode == "serve":
        serve(int(where), rest)
    else:
        start(where, rest)
