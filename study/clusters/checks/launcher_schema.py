"""What Ray's launcher would not take of a cluster file: unknown fields, and values of another kind."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from study.clusters.checks.parts import Config


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
