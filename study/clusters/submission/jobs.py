"""The jobs of a study on a Ray cluster: their names, how they stand, and what to do about them. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainables.execution.signals import RESUMABLE

LIVE, DONE = ("PENDING", "RUNNING"), "SUCCEEDED"
"""Of a job's states, which Ray also has as STOPPED and FAILED."""

CONFIG_ENDS = "END_OF_CONFIG"


@dataclass(frozen=True)
class Job:
    """What the job server tells of a job.

    Attributes:
        id: by which it was submitted; None of a driver that was not.
        state: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        entrypoint: its command, for a shell.
        code: its exit code, if it ended by itself.
        message: what Ray says of its state.
    """

    id: str | None
    state: str
    entrypoint: str = ""
    code: int | None = None
    message: str = ""

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Job:
        """From the server's JSON."""
        return cls(
            answer.get("submission_id"),
            answer["status"],
            answer.get("entrypoint") or "",
            answer.get("driver_exit_code"),
            answer.get("message") or "",
        )

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.state in LIVE

    @property
    def exit_code(self) -> int:
        """What the study ended with; one that was stopped, killed or lost with its node can be run again."""
        if self.state == DONE:
            return 0
        return RESUMABLE if self.code is None or self.code < 0 else self.code


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        id: of the job to follow.
        submits: whether it has to be submitted first.
        ended: the one before it, which has to be done again.
        differs: whether the job was begun by another command than the one that is given.
    """

    id: str
    submits: bool = False
    ended: Job | None = None
    differs: bool = False


def job_id(study: str, number: int) -> str:
    """Of a study's job, numbered from 1: whoever asks for the study comes to the same one."""
    return f"paretovl-{study}-{number}"


def jobs_of(study: str, jobs: Iterable[Job]) -> dict[int, Job]:
    """The jobs of a study by number, in order."""
    pattern = re.compile(re.escape(job_id(study, 0)[:-1]) + r"([1-9]\d*)")
    found = {int(match[1]): job for job in jobs if job.id is not None and (match := pattern.fullmatch(job.id))}
    return dict(sorted(found.items()))


def decide(study: str, jobs: Iterable[Job], entrypoint: str) -> Plan:
    """Follow what runs; what is done with this command is told again; all else is submitted under the next number."""
    numbered = jobs_of(study, jobs)
    if not numbered:
        return Plan(job_id(study, 1), submits=True)
    number, last = list(numbered.items())[-1]
    differs = last.entrypoint != entrypoint
    if last.live or (last.state == DONE and not differs):
        return Plan(job_id(study, number), differs=differs)
    return Plan(job_id(study, number + 1), submits=True, ended=last, differs=differs)


def study_entrypoint(
    python: str, flags: Sequence[str], variables: Mapping[str, str], config: str | None, secrets: str | None
) -> str:
    """The command of a job that runs a study. The dashboard shows it, so it has no password.

    Args:
        python: interpreter, on the cluster.
        flags: of `study.run`, but for --config.
        variables: that set fields.
        config: what is in the --config file.
        secrets: file on the head with further variables, which is read once.
    """
    given = [*flags, *([] if config is None else ["--config", "/dev/stdin"])]
    command = f"{revealed(secrets)}exec {with_variables(variables, [python, '-m', 'study.run', *given])}"
    return command if config is None else f"{command} <<'{CONFIG_ENDS}'\n{config.rstrip()}\n{CONFIG_ENDS}"


def with_variables(variables: Mapping[str, str], command: Sequence[str]) -> str:
    """A command with variables, for a shell."""
    return shlex.join(["env", *(f"{name}={value}" for name, value in sorted(variables.items())), *command])


def revealed(secrets: str | None) -> str:
    """Reads a file of variables, if it is there, and removes it."""
    return "" if secrets is None else f"[ ! -f {secrets} ] || {{ set -a; . {secrets}; set +a; rm {secrets}; }}; "


RESULTS = "-----BEGIN RESULTS-----", "-----END RESULTS-----"
"""Lines around them in a log."""


def results_entrypoint(python: str, study: str, studies_dir: str, secrets: str | None) -> str:
    """The command of a job that prints a study's results, see `results_in`."""
    export = shlex.join([python, "-m", "study.export", "--name", study, "--studies-dir", studies_dir, "--archive"])
    return (
        f"{revealed(secrets)}made=$(mktemp -d) && {export} $made/results.tar.gz && "
        f"echo {RESULTS[0]} && base64 $made/results.tar.gz && echo {RESULTS[1]}; code=$?; rm -r $made; exit $code"
    )


def results_in(log: str) -> str | None:
    """What stands between the lines, in base64; None without both."""
    lines = log.splitlines()
    if not set(RESULTS) <= set(lines):
        return None
    return "".join(lines[lines.index(RESULTS[0]) + 1 : lines.index(RESULTS[1])])
