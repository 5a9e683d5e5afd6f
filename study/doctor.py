"""`python -m study.doctor`: what would go wrong with a cluster file, before anything is paid. Changes nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.clusters.checks import aws_account
from study.clusters.checks.cluster_file import problems
from study.clusters.checks.launcher_schema import misshapen, read_cluster
from study.clusters.checks.parts import Surroundings
from trainables.cli.command import command_parser, exit_on_input_error, place

SECRETS = re.compile(r"id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12)|\.(env|netrc|pgpass|boto)|credentials(\.\w+)?")
"""Names of files with keys or passwords."""
MEANT_FOR_NODES = ("~/.ray/auth_token", "~/.pgpass")


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
    mounts = [str(local) for local in _part(config, "file_mounts").values()]
    named = [*mounts, str(_part(config, "auth").get("ssh_private_key"))]
    return Surroundings(
        ray=importlib.metadata.version("ray"),
        pythons=importlib.metadata.metadata("paretovl")["Requires-Python"],
        files=frozenset(path for path in named if Path(path).expanduser().exists()),
        secrets={path: secret for path in mounts if (secret := secret_in(path))},
        programs=frozenset(name for name in ("ssh", "rsync") if shutil.which(name)),
        modules=frozenset(name for name in ("boto3", "googleapiclient") if importlib.util.find_spec(name)),
        variables=dict(os.environ),
    )


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def secret_in(path: str) -> str | None:
    """A file with keys or passwords at a path or below it, by its name; the two that nodes need are none."""
    place = Path(path).expanduser()
    if path in MEANT_FOR_NODES or not place.exists():
        return None
    walked = os.walk(place) if place.is_dir() else [(str(place.parent), [], [place.name])]
    for folder, inner, names in walked:
        inner[:] = [name for name in inner if name not in (".venv", ".git", "node_modules")]
        if found := next((name for name in sorted(names) if SECRETS.fullmatch(name)), None):
            return str(Path(folder) / found)
    return None


def account(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What the AWS account says is wrong, and what it could not be asked."""
    kind = config["provider"].get("type")
    if kind not in ("aws", "gcp", "local"):
        return [], [f"what is special about provider {kind}; known are aws, gcp and local"]
    if kind != "aws":
        return [], ["open ports and quotas, which the cloud or the machines would have to be asked for"]
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError
    except ImportError:
        return [], [f"{what}: boto3 is not there" for what in aws_account.CHECKS]
    wrong: list[str] = []
    unchecked: list[str] = []
    for what, check in aws_account.CHECKS.items():
        try:
            wrong += check(config, lambda service: boto3.client(service, region_name=config["provider"].get("region")))
        except NoCredentialsError:
            return ["AWS: there are no keys of an account here, without which nothing starts; `aws configure`"], []
        except NoRegionError:
            return [], ["the account, as the file names no region"]
        except (BotoCoreError, ClientError) as error:
            if aws_account.knows_nobody(error):
                return [*wrong, f"AWS: {error}; give this machine keys that count with `aws configure`, or sign in"], []
            (wrong if aws_account.finds_nothing(error) else unchecked).append(f"{what}: {error}")
    return wrong, unchecked


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    with exit_on_input_error():
        given = parser().parse_args(arguments)
        config = read_cluster(given.cluster)
        wrong = problems(config, surroundings(config))
        unchecked: list[str] = []
        if not any(misshapen(config)):
            told, unchecked = account(config)
            wrong += told
        for problem in wrong:
            print(f"wrong: {problem}")
        for what in unchecked:
            print(f"not checked: {what}")
        print(f"{len(wrong)} to mend before `ray up`" if wrong else "nothing found that would go wrong")
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
