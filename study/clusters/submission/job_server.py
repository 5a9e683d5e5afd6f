"""The job server of a Ray cluster over HTTP, from a machine that may sleep, move and lose its connection.

Ray's own client waits for ever for an answer that does not come.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

from study.clusters.submission.jobs import Job
from trainables.errors import Away, InputError

ANSWER_SECONDS, CONNECT_SECONDS = 60.0, 10.0
LONGEST_WAIT_SECONDS = 60.0
"""Between two attempts to connect; they double from one second on."""
WATCHER_SECONDS = 1.5
"""Ray's watcher of a job looks once a second."""
STOP_SECONDS = 600
"""That a study has to end in order, which Ray would kill after three."""

Answer = TypeVar("Answer")


class _Lost(Exception):
    """The server does not answer now."""


class JobServer:
    """Jobs on one cluster.

    Args:
        address: http://HOST:PORT of the dashboard.
        mend: brings the way there back, where there is one to mend. May block.
    """

    def __init__(self, address: str, mend: Callable[[], None] = lambda: None) -> None:
        self._address, self._mend = address.rstrip("/"), mend

    async def __aenter__(self) -> JobServer:
        self._session = aiohttp.ClientSession(
            headers=_authorization(),
            timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=CONNECT_SECONDS),
            connector=aiohttp.TCPConnector(socket_factory=_watched_socket),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def reach(self, seconds: float) -> None:
        """Wait for the first answer.

        Raises:
            Away: there is none in so many seconds.
            InputError: the server wants another token.
        """
        end = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                await self._ask("GET", "/api/version")
                return
            except _Lost as lost:
                if asyncio.get_running_loop().time() > end:
                    raise Away(f"no Ray job server answers at {self._address}: {lost}") from None
            await asyncio.sleep(1)
            await asyncio.to_thread(self._mend)

    async def jobs(self) -> list[Job]:
        """All that the cluster knows, drivers that were not submitted among them."""
        return [Job.of(answer) for answer in await self._patiently(lambda: self._ask("GET", "/api/jobs/"))]

    async def job(self, name: str) -> Job | None:
        """One of them; None if the cluster does not know it."""
        answer = await self._patiently(lambda: self._ask("GET", f"/api/jobs/{name}"))
        return None if answer is None else Job.of(answer)

    async def log(self, name: str) -> str:
        """All of a job's output."""
        answer = await self._patiently(lambda: self._ask("GET", f"/api/jobs/{name}/logs"))
        return "" if answer is None else str(answer["logs"])

    async def submit(self, name: str, entrypoint: str) -> None:
        """Begin a job, or find that somebody did, or that it was begun before the connection was lost."""
        environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
        asked = {"entrypoint": entrypoint, "submission_id": name, "runtime_env": environment}

        async def once() -> None:
            if await self._ask("GET", f"/api/jobs/{name}") is None:
                await self._ask("POST", "/api/jobs/", json=asked)

        await self._patiently(once)

    async def stop(self, name: str) -> None:
        """Ask a job to end."""
        await self._patiently(lambda: self._ask("POST", f"/api/jobs/{name}/stop"))

    async def forget(self, name: str) -> None:
        """Remove an ended job from the list.

        Ray's watcher of the job writes a new row for it where it finds none.
        """
        while await self.job(name) is not None:
            await self._patiently(lambda: self._ask("DELETE", f"/api/jobs/{name}"))
            await asyncio.sleep(WATCHER_SECONDS)

    async def ended(self, name: str) -> Job | None:
        """Wait for the end of a job; None if the cluster does not know it any more."""
        while (job := await self.job(name)) is not None and job.live:
            await asyncio.sleep(1)
        return job

    async def follow(self, name: str, show: Callable[[str], None]) -> Job | None:
        """Show all of a job's output until it ends, over however many connections.

        Args:
            name: of the job.
            show: is given each part once, in order.

        Returns:
            The ended job; None if the cluster does not know it any more.
        """
        shown = 0
        while (job := await self.job(name)) is not None:
            if not job.live:
                show((await self.log(name))[shown:])
                return job
            came = 0  # every connection tells all from the beginning
            with suppress(aiohttp.ClientError, OSError):
                async with self._session.ws_connect(f"{self._address}/api/jobs/{name}/logs/tail") as tail:
                    async for message in tail:
                        text = str(message.data)
                        show(text[max(0, shown - came) :])
                        came += len(text)
                        shown = max(shown, came)
            await asyncio.sleep(1)
        return None

    async def _patiently(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer, however long the connection is lost."""
        seconds = 1.0
        while True:
            try:
                answer = await ask()
            except _Lost as lost:
                print(f"no connection ({lost}); the next attempt is in {seconds:.0f} s", file=sys.stderr, flush=True)
            else:
                if seconds > 1:
                    print("connected again", file=sys.stderr, flush=True)
                return answer
            await asyncio.sleep(seconds)
            seconds = min(2 * seconds, LONGEST_WAIT_SECONDS)
            await asyncio.to_thread(self._mend)

    async def _ask(self, method: str, path: str, **given: Any) -> Any:
        """The answer's JSON; None where there is no such thing.

        Raises:
            InputError: the server does not accept the token, or what is asked.
            _Lost: it does not answer, or cannot now.
        """
        try:
            async with self._session.request(method, self._address + path, **given) as answer:
                if answer.status in (401, 403):
                    raise InputError(
                        f"{self._address} does not accept the token; ~/.ray/auth_token, or what RAY_AUTH_TOKEN or "
                        "RAY_AUTH_TOKEN_PATH say, has to be as on the cluster"
                    )
                if answer.status == 404:
                    return None
                if not answer.ok:
                    last = (await answer.text()).strip().splitlines()[-1:]
                    told = f"{self._address} answers {answer.status}: {' '.join(last)}"
                    raise InputError(told) if answer.status < 500 else _Lost(told)
                return await answer.json()
        except (aiohttp.ClientError, OSError) as error:  # a timeout among them
            raise _Lost(str(error) or type(error).__name__) from None


def _authorization() -> dict[str, str]:
    """The token as Ray finds it, if there is one."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text(encoding="utf-8") if path.is_file() else "")
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def _watched_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """One that is found dead in half a minute: nothing is sent while a log is followed, and Ray answers no pings."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))  # macOS has its own name
    for option, value in ((idle, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        if option is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
