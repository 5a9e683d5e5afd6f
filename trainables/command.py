"""What the commands have in common: YAML in, one clear message out."""

from __future__ import annotations

import argparse
import difflib
import inspect
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from trainables.config import TrialConfig


class InputError(ValueError):
    """Input that cannot be used; its text is the whole message for the user. Exit code 2."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn unusable input into one message and exit code 2, without a traceback."""
    from trainables.data import DataError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows an escape and the study goes on
    try:
        yield
    except (InputError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        InputError: no such file, no YAML, or no mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is no YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not fields with values")
    return value


def redacted(text: str) -> str:
    """The text without the passwords of the URLs in it.

    Example:
        >>> redacted("postgresql://me:secret@db:5432/mlflow")
        'postgresql://me:***@db:5432/mlflow'
    """
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"(password=)[^&\s]+", r"\1***", text)


def all_mistakes(error: ValidationError, schema: type[BaseModel], source: str) -> InputError:
    """Every mistake of a configuration in one message: field, what was given, what is accepted."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"] if not str(part).startswith("function-")) or "(whole)"
        if item["type"] == "extra_forbidden":
            lines.append(f"  {field}: no such field{_meant(field, schema)}")
        elif item["type"] == "missing":
            lines.append(f"  {field}: is required")
        else:
            one = isinstance(item["input"], str | int | float | None)
            given = f" (given: {item['input']!r})" if one else ""
            lines.append(f"  {field}: {item['msg'].removeprefix('Value error, ')}{given}")
    count = f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake"
    return InputError(f"{count} in {source}:\n" + "\n".join(lines) + "\nsee --help for every field")


def _meant(field: str, schema: type[BaseModel]) -> str:
    """Where a field of about this name is, nearest first."""
    inside, _, name = field.rpartition(".")
    paths = [path.rpartition(".") for path in _paths(schema)]
    names = {last for _, _, last in paths}
    near = [name] if name in names else difflib.get_close_matches(name, names, n=3, cutoff=0.75)
    found = [("".join(path), path[0] != inside) for last in near for path in paths if path[2] == last]
    best = [path for path, _ in sorted(found, key=lambda item: item[1])][:3]
    return f"; did you mean {' or '.join(best)}?" if best else ""


def _paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")


def read_config(arguments: Sequence[str], program: str) -> TrialConfig:
    """The trial configuration named on the command line.

    Raises:
        InputError: with all its mistakes.
    """
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("config", type=Path, help="YAML file with the fields of TrialConfig; an empty file is a trial")
    path = parser.parse_args(arguments).config
    try:
        return TrialConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise all_mistakes(error, TrialConfig, str(path)) from None
