"""`python -m study.cluster`: write the file of a cluster, for a person to read, edit and give to `ray up`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import cache
from tempfile import TemporaryDirectory

import study.arguments
from study.clusters.files.common import Cluster
from study.costs.page import Plan
from study.plan import Arguments, plan
from trainables.cli.command import exit_on_input_error
from trainables.cli.flags import from_command_line
from trainables.cli.help import asked
from trainables.errors import InputError

PROVIDERS = ("aws", "gcp", "local", "kuberay", "slurm")
"""Each is a module of `study.clusters.files` with `Settings`, whose fields are the flags, and `render`, which takes
them and the plan of their `plan_flags`."""


def parse(given: Sequence[str]) -> Cluster:
    """What the flags ask for, as the settings of their provider.

    Raises:
        InputError: with all mistakes at once.
        SystemExit: after --help.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--provider", default=PROVIDERS[0])
    provider = early.parse_known_args(asked(given)[1])[0].provider
    if provider not in PROVIDERS:
        raise InputError(f"provider {provider!r}: there are {', '.join(PROVIDERS)}")
    schema: type[Cluster] = importlib.import_module(f"study.clusters.files.{provider}").Settings
    return from_command_line(schema, given, {}, "the cluster")


def text(settings: Cluster) -> str:
    """The file that is asked for.

    Raises:
        InputError: a trial of the preset needs more GPUs than there would be; and see `render` of the provider.
    """
    flags = settings.plan_flags()
    render = importlib.import_module(f"study.clusters.files.{settings.provider}").render
    return str(render(settings, _plan(*flags) if flags else None))


@cache
def _plan(*flags: str) -> Plan:
    with TemporaryDirectory() as nowhere:  # a study of that name that was begun here is not what is asked for
        return plan(study.arguments.parse([*flags, "--studies-dir", nowhere], Arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    with exit_on_input_error():
        print(text(parse(sys.argv[1:] if arguments is None else arguments)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
