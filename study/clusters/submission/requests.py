"""What is asked of a cluster: the same study that `study.run` would run here, checked before anything is brought up."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from study.arguments import Arguments, parse
from study.clusters.files.common import variables_of
from study.clusters.submission.jobs import study_entrypoint
from trainables.cli.flags import NOT_OURS, PREFIX
from trainables.errors import InputError, has_password
from trainables.execution.places import MODELS, is_path


@dataclass(frozen=True)
class Request:
    """What is to run.

    Attributes:
        name: of the study.
        studies_dir: on the cluster.
        python: interpreter there.
        entrypoint: the job's command.
        secrets: variables with passwords.
        secrets_file: on the head, where they are read once; None where nothing but HTTP leads there.
    """

    name: str
    studies_dir: str
    python: str
    entrypoint: str
    secrets: Mapping[str, str]
    secrets_file: str | None


def described(
    flags: Sequence[str], config: Path | None, own: Mapping[str, str], cluster: Mapping[str, Any] | None
) -> Request:
    """What a command asks of a cluster, checked as far as it can be here.

    Args:
        flags: of `study.run`, but for --config.
        config: that file.
        own: variables here.
        cluster: its file, parsed; None where nothing but HTTP leads there.

    Raises:
        InputError: with all mistakes.
    """
    head, python = ({}, "python") if cluster is None else (variables_of(cluster), f"{ray_folder(cluster)}python")
    variables = {"PARETOVL_CLUSTER__ADDRESS": "auto", **_fields(head), **_fields(own)}
    with _environment(variables):
        study = parse([*flags, *([] if config is None else ["--config", str(config)])], begun=False)
    text = None if config is None else config.read_text(encoding="utf-8")
    secrets = {name: value for name, value in variables.items() if has_password(value)}
    problems = list(_only_here(study))
    if text is not None and any(map(has_password, text.splitlines())):
        problems.append(
            f"{config} holds a password, and whoever sees the dashboard could read it: leave it out, and give the URL "
            "with it as PARETOVL_STORAGE or PARETOVL_TRACKING__URI"
        )
    if secrets and cluster is None:
        problems.append(
            f"{', '.join(secrets)}: a password cannot be brought over HTTP without being kept there; give the variable "
            "to the head itself (Kubernetes: a Secret), or put the password into its ~/.pgpass, and leave it out here"
        )
    if problems:
        raise InputError("\n  ".join([f"study {study.name} cannot be submitted:", *problems]))
    file = f"~/.paretovl-{study.name}.env" if cluster is not None else None
    shown = {name: value for name, value in variables.items() if name not in secrets}
    entrypoint = study_entrypoint(python, flags, shown, text, file)
    return Request(study.name, str(study.studies_dir), python, entrypoint, secrets, file)


def _fields(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that set fields of a study; the file of --config is another thing on the cluster."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(PREFIX) and not name.startswith(NOT_OURS) and name != "PARETOVL_CONFIG"
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within, these variables are set."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _only_here(study: Arguments) -> Iterator[str]:
    """Paths that mean something in a folder of this machine only."""
    named = {f"trial.model.{name}": getattr(study.trial.model, name) for name in MODELS}
    attacks = {f"protocol.attacks.{number}": attack.file for number, attack in enumerate(study.protocol.attacks)}
    paths = dict(_paths(study.model_copy(update={"config": None})))
    paths |= {field: Path(name) for field, name in named.items() if name is not None and is_path(name)}
    paths |= {field: file for field, file in attacks.items() if file is not None}
    for field, path in paths.items():
        if not path.is_absolute():
            yield f"{field}: {path} is relative to a folder of this machine; give the path on the cluster, from / on"


def _paths(value: Any, field: str = "") -> Iterator[tuple[str, Path]]:
    """Every path in a configuration, by its field."""
    if isinstance(value, Path):
        yield field, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name), f"{field}.{name}".lstrip("."))
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            yield from _paths(part, f"{field}.{number}")


def ray_folder(config: Mapping[str, Any]) -> str:
    """Where a cluster file's nodes have `ray`, and `python` beside it; empty: on the PATH."""
    starts = " ".join(map(str, config.get("head_start_ray_commands") or ()))
    found = re.search(r"(\S*/)?ray start\b", starts)
    return (found[1] or "") if found else ""
