"""What Ray's launcher would not take of a cluster file: unknown fields, and values of another kind."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from study.clusters.checks.parts import Config
from trainables.cli.command import read_yaml
from trainables.errors import InputError


def read_cluster(file: Path) -> dict[str, Any]:
    """A file for Ray's launcher.

    Raises:
        InputError: it cannot be read, or is another kind of file; what to do with that is said.
    """
    with suppress(OSError):
        if file.read_bytes().startswith(b"#!"):
            raise InputError(f"{file}: is a script, as for Slurm, and no file for `ray up`; sbatch {file}")
    config = read_yaml(file)
    if not config:
        raise InputError(f"{file}: is empty; the command that should have written it failed, so run that again")
    if config.get("kind") == "RayJob":
        raise InputError(f"{file}: is a RayJob, and no file for `ray up`; kubectl replace --force -f {file}")
    if not isinstance(config.get("provider"), dict):
        raise InputError(f"{file}: has no provider, so it is no file for `ray up`; study.cluster writes one")
    return config


@cache
def _schema() -> Any:
    """Of Ray, which is not imported for it."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))


def misshapen(config: Config) -> Iterator[str]:
    """Every part of the file that Ray's launcher would refuse."""
    for mistake in jsonschema.Draft7Validator(_schema()).iter_errors(config):
        place = ".".join(map(str, mistake.absolute_path))
        if mistake.validator == "additionalProperties":
            known = mistake.schema.get("properties", {})
            for name in sorted(set(mistake.instance) - set(known), key=str):
                yield f"{place}.{name}: Ray's launcher knows no such field; there are {', '.join(known)}".lstrip(".")
        elif mistake.validator == "type":
            kind = type(mistake.instance).__name__
            yield f"{place}: is of type {kind}, Ray's launcher takes {mistake.validator_value}"
        else:
            yield f"{place}: {mistake.message}".removeprefix(": ")
