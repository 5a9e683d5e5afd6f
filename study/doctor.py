"""`python -m study.doctor`: what would go wrong with a cluster file, before anything is paid. Changes nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.clusters.checks import aws_account
from study.clusters.checks.cluster_file import Surroundings, problems
from trainables.cli.command import command_parser, exit_on_input_error, place, read_yaml
from trainables.errors import InputError


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = command_parser(
        "python -m study.doctor",
        "Say what would go wrong with a cluster file, and what could not be checked. Exit code 2 if something would.",
        "python -m study.doctor --cluster cluster.yaml",
    )
    made.add_argument("--cluster", type=place, default=Path("cluster.yaml"), help="file for `ray up`")
    return made


def surroundings(config: Mapping[str, Any]) -> Surroundings:
    """This machine."""
    locals_ = [str(local) for local in (config.get("file_mounts") or {}).values()]
    return Surroundings(
        ray=importlib.metadata.version("ray"),
        pythons=importlib.metadata.metadata("paretovl")["Requires-Python"],
        files=frozenset(local for local in locals_ if Path(local).expanduser().exists()),
        programs=frozenset(name for name in ("ssh", "rsync") if shutil.which(name)),
        modules=frozenset(name for name in ("boto3", "googleapiclient") if importlib.util.find_spec(name)),
        variables=dict(os.environ),
    )


def account(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What the AWS account says is wrong, and what it could not be asked."""
    if config["provider"].get("type") != "aws":
        return [], ["open ports and quotas, which the cloud or the machines would have to be asked for"]
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return [], [f"{what}: boto3 is not there" for what in aws_account.CHECKS]
    wrong: list[str] = []
    unchecked: list[str] = []
    for what, check in aws_account.CHECKS.items():
        try:
            wrong += check(config, lambda service: boto3.client(service, region_name=config["provider"].get("region")))
        except (BotoCoreError, ClientError) as error:
            unchecked.append(f"{what}: {error}")
    return wrong, unchecked


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    with exit_on_input_error():
        given = parser().parse_args(arguments)
        config = read_yaml(given.cluster)
        if not isinstance(config.get("provider"), dict):
            raise InputError(f"{given.cluster}: has no provider, so it is no file for `ray up`")
        wrong, unchecked = account(config)
        wrong = problems(config, surroundings(config)) + wrong
        for problem in wrong:
            print(f"wrong: {problem}")
        for what in unchecked:
            print(f"not checked: {what}")
        print(f"{len(wrong)} to mend before `ray up`" if wrong else "nothing found that would go wrong")
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
