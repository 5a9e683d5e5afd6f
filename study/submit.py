"""`python -m study.submit`: run a study as a job on a cluster, follow it, and fetch what came out.

The job does not depend on this machine: let it sleep, lose the connection, or press Ctrl-C. The same command, from any
folder or machine, finds the job again. A study that did not end is submitted again by it, and goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import re
import secrets
import shlex
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from study.clusters.checks.cluster_file import problems, unreachable
from study.clusters.checks.parts import Config, Surroundings
from study.clusters.submission.job_server import JobServer
from study.clusters.submission.jobs import Job, Plan, decide, jobs_of, results_entrypoint, results_in
from study.clusters.submission.launcher import Launcher, folder_of
from study.clusters.submission.requests import Request, described
from study.doctor import surroundings
from study.paths import StudyPaths
from trainables.cli.command import argument, command_parser, exit_on_input_error, place
from trainables.cli.passwords import hide_passwords
from trainables.errors import Away, InputError
from trainables.execution.signals import INTERRUPTED, RESUMABLE

TAIL_LINES = 15
"""Of a job that has to be done again."""
BROUGHT_UP_SECONDS, RUNNING_SECONDS = 180.0, 10.0
"""For the job server's first answer."""
REFUSED = 2
"""Exit code of a study that was not begun."""


def cluster_place(text: str) -> str | Path:
    """The URL of a job server, or the file of a cluster."""
    return text if re.match(r"https?://", text) else place(text)


def parser() -> argparse.ArgumentParser:
    """Of the command's own flags; those of `study.run` are read by its parser."""
    made = command_parser(
        "python -m study.submit",
        f"{__doc__}\n\nTakes every flag of study.run besides; `python -m study.run --help` shows them.",
        "python -m study.submit --cluster cluster.yaml --preset coco_clip_b16",
        "python -m study.submit --cluster http://HOST:8265 --studies-dir /mnt/studies",
        "python -m study.submit --cluster cluster.yaml --preset coco_clip_b16 --stop",
    )
    made.add_argument(
        "--cluster",
        required=True,
        type=argument(cluster_place),
        metavar="WHERE",
        help="file of Ray's launcher, which is brought up if it is not; or http://HOST:8265 of a cluster that runs",
    )
    made.add_argument(
        "--stop", action="store_true", help="end the study in order, as Ctrl-C on a machine; it can go on"
    )
    made.add_argument("--config", type=place, metavar="PATH", help="YAML file with fields of the study")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, flags = parser().parse_known_args(given)
    command = shlex.join(["python", "-m", "study.submit", *given])
    with exit_on_input_error():
        config = options.config or (place(file) if (file := os.environ.get("PARETOVL_CONFIG")) else None)
        launcher = Launcher(options.cluster) if isinstance(options.cluster, Path) else None
        request = described(flags, config, os.environ, launcher.config if launcher else None)
        refuse_local(StudyPaths(Path("studies") / request.name))
        try:
            if launcher is None:
                return asyncio.run(_over_http(options, request, command))
            return over_ssh(launcher, options.stop, request, command)
        except Away as gone:
            print(f"{gone}; to try again: {command}", file=sys.stderr)
            return RESUMABLE
        except KeyboardInterrupt:
            again = command if options.stop else f"{command}\nto stop it: {command} --stop"
            print(f"\nwhat was submitted goes on without this machine; to follow it: {again}", file=sys.stderr)
            return INTERRUPTED


def refuse_local(paths: StudyPaths) -> None:
    """What is fetched must not get among the files of a study that runs here.

    Raises:
        InputError: there is one.
    """
    if paths.database.exists() or paths.runs.exists():
        raise InputError(
            f"{paths.root} is a study of this machine, and results from the cluster would be put there; give another "
            "--name, or use another folder"
        )


def refuse_wrong(launcher: Launcher, wrong: Callable[[Config, Surroundings], list[str]] = problems) -> None:
    """See that a cluster file can be brought up from here, or as much of that as is looked for.

    Args:
        launcher: of the cluster.
        wrong: what is looked for.

    Raises:
        InputError: with all that is wrong.
    """
    with chdir(folder_of(launcher.config, launcher.file)):
        found = wrong(launcher.config, surroundings(launcher.config))
    if found:
        more = f"nothing was brought up; to do it all the same: ray up --no-restart {launcher.file}"
        raise InputError("\n  ".join([f"{launcher.file}:", *found, more]))


async def _over_http(options: argparse.Namespace, request: Request, command: str) -> int:
    async with JobServer(options.cluster) as server:
        await server.reach(RUNNING_SECONDS)
        return await Submission(server, request, command).done(options.stop)


def over_ssh(launcher: Launcher, stop: bool, request: Request, command: str) -> int:
    """On a cluster of Ray's launcher, which is brought up if it is not. Ray on its head is never restarted."""
    refuse_wrong(launcher, unreachable)
    state = launcher.state()
    runs = state in ("up", "foreign")
    if stop and not runs:
        print(f"the cluster is {state}, so nothing of study {request.name} runs")
        return 0
    if not runs:
        refuse_wrong(launcher)
        print(f"the cluster is {state}: it is brought up", flush=True)
        launcher.up()
        if launcher.state() == "down":  # a head without Ray, on which nothing can be lost
            launcher.up(restart=True)

    if state == "foreign" and not stop:
        print("this machine did not bring the cluster up, so the code there stays as it is", flush=True)

    async def session() -> int:
        async with JobServer(launcher.address(), launcher.connect) as server:
            await server.reach(RUNNING_SECONDS if runs else BROUGHT_UP_SECONDS)
            return await Submission(server, request, command, launcher, may_update=state == "up").done(stop)

    launcher.connect()
    try:
        return asyncio.run(session())
    finally:
        launcher.disconnect()


@dataclass(frozen=True)
class Submission:
    """A study on a cluster that can be reached.

    Attributes:
        server: that runs jobs.
        request: what is to run.
        command: what was typed.
        launcher: of a cluster that this machine has brought up.
        may_update: whether `ray up --no-restart` may bring newer files there.
    """

    server: JobServer
    request: Request
    command: str
    launcher: Launcher | None = None
    may_update: bool = False

    async def done(self, stop: bool) -> int:
        """Run, or stop it. Returns the exit code."""
        return await (self.stopped() if stop else self.followed())

    async def followed(self) -> int:
        """Submit the study unless it is there, follow it to its end and fetch what came out."""
        jobs = await self.server.jobs()
        plan = decide(self.request.name, jobs, self.request.entrypoint)
        if plan.submits:
            if plan.ended is not None:
                await self._tell_ended(plan.ended)
            self.update(jobs)
            await self._submit(plan.id, self.request.entrypoint)
        print(told(plan), flush=True)
        job = await self.server.follow(plan.id, show)
        if job is None:
            print(
                f"the cluster does not know {plan.id} any more: its head was lost. What the study left on storage is "
                f"there; to go on: {self.command}",
                file=sys.stderr,
            )
            return RESUMABLE
        return await self._ended(job)

    async def stopped(self) -> int:
        """End the study's job in order, and fetch what came out."""
        live = [job for job in jobs_of(self.request.name, await self.server.jobs()).values() if job.live]
        if not live:
            print(f"nothing of study {self.request.name} runs")
            return 0
        for job in live:
            name = str(job.id)
            print(f"{name} is stopping: trials keep their last checkpoints", flush=True)
            await self.server.stop(name)
            await self.server.ended(name)
            print(last_lines(await self.server.log(name)))
        await self._fetch()
        again = self.command.replace(" --stop", "")
        print(f"study {self.request.name} is stopped; to go on: {again}")
        return 0

    async def _tell_ended(self, job: Job) -> None:
        """How the job before ended, unless it was stopped on purpose or did what was asked."""
        if job.exit_code in (0, INTERRUPTED) or job.state == "STOPPED":
            return
        end = last_lines(await self.server.log(str(job.id)))
        print(f"{job.id} ended with exit code {job.exit_code}; its last lines:\n{end}")

    def update(self, jobs: Sequence[Job]) -> None:
        """Bring the code there up to date, where nothing runs that would notice."""
        if self.launcher is None or not self.may_update:
            return
        if busy := [job.id or job.entrypoint or "a driver" for job in jobs if job.live]:
            print(f"the code on the cluster stays as it is, since this runs there: {', '.join(busy)}", flush=True)
            return
        refuse_wrong(self.launcher)
        print("the cluster is brought up to date by `ray up --no-restart`, which does not stop what runs", flush=True)
        self.launcher.up()

    async def _submit(self, name: str, entrypoint: str) -> None:
        """Passwords go another way than the command, which everybody can see who sees the dashboard."""
        request = self.request
        if request.secrets and self.launcher is not None and request.secrets_file is not None:
            lines = [f"{variable}={shlex.quote(value)}\n" for variable, value in request.secrets.items()]
            self.launcher.put("".join(lines), request.secrets_file)
        await self.server.submit(name, entrypoint)

    async def _ended(self, job: Job) -> int:
        code = job.exit_code
        if code != REFUSED:
            await self._fetch()
        why = f" ({job.message.splitlines()[0]})" if job.code is None and job.message else ""
        print(f"{job.id} ended with exit code {code}{why}")
        if code in (RESUMABLE, INTERRUPTED):
            print(f"to go on: {self.command}")
        return code

    async def _fetch(self) -> None:
        """Results into the local folder of studies. Without them the study is still there."""
        request, name = self.request, f"paretovl-{self.request.name}-results-x{secrets.token_hex(4)}"
        await self._submit(
            name, results_entrypoint(request.python, request.name, request.studies_dir, request.secrets_file)
        )
        await self.server.ended(name)
        log = await self.server.log(name)
        await self.server.forget(name)
        folder = Path("studies") / request.name
        try:
            files = unpacked(results_in(log), folder)
        except (ValueError, OSError, tarfile.TarError) as error:
            print(f"the results were not fetched: {str(error) or last_lines(log, 1)}", file=sys.stderr)
        else:
            print(f"fetched into {folder}: {', '.join(files)}")


def unpacked(packed: str | None, folder: Path) -> list[str]:
    """The files of a .tar.gz in base64, which are then in the folder.

    Raises:
        ValueError, OSError, tarfile.TarError: it is none, or they cannot be written.
    """
    if packed is None:
        raise ValueError
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed, validate=True)), mode="r:gz") as tar:
        folder.mkdir(parents=True, exist_ok=True)
        tar.extractall(folder, filter="data")
        return tar.getnames()


def told(plan: Plan) -> str:
    """In words."""
    if plan.submits and plan.ended is not None:
        return f"study submitted as {plan.id}, after {plan.ended.id} ended with exit code {plan.ended.exit_code}"
    if plan.submits:
        return f"study submitted as {plan.id}"
    if plan.differs:
        return (
            f"{plan.id} runs with other flags or settings than these, which count after it was stopped (--stop) and "
            "submitted again"
        )
    return f"following {plan.id}"


def last_lines(log: str, count: int = TAIL_LINES) -> str:
    """Of a log."""
    return "\n".join(log.rstrip().splitlines()[-count:])


def show(text: str) -> None:
    """Print a part of a log."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    hide_passwords()
    sys.exit(main())
