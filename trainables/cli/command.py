"""What the commands have in common: YAML in, one clear message out."""

from __future__ import annotations

import argparse
import difflib
import errno
import inspect
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from trainables.cli import yaml_core
from trainables.config import TrialConfig
from trainables.config.fields import expanded_place
from trainables.errors import Away, InputError, redacted
from trainables.execution.signals import RESUMABLE
from trainables.files import Location, location
from trainables.object_storage import storage_away

Checked = TypeVar("Checked")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What a disk answers that takes no more; a write that was held back until a file is closed does not name it."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn unusable input, and files that cannot be used, into one message and exit code 2, without a traceback.

    What does not answer now, and may later, is exit code 75.
    """
    from trainables.data import DataError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows an escape and the study goes on
    sys.excepthook = _told
    try:
        yield
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if (gone := _away(error)) is not None:
            print(f"stopped: {redacted(gone)}; nothing is lost: run the same command again", file=sys.stderr)
            raise SystemExit(RESUMABLE) from None
        if isinstance(error, InputError | DataError):
            said = str(error)
        elif isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):  # a file of the user's
            said = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
        else:
            raise
        print(f"error: {redacted(said)}", file=sys.stderr)
        raise SystemExit(2) from None


def _away(error: Exception) -> str | None:
    """What does not answer, if an error came of that."""
    if isinstance(error, Away):
        return str(error)
    storage = storage_away(error)
    return None if storage is None else f"{storage.filename} does not answer ({storage.strerror})"


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback without passwords: libraries quote URLs."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


def read_yaml(path: Location) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        InputError: no such file, no YAML, no mapping, or keys that stand in it more than once.
    """
    try:
        value = yaml_core.load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml_core.RepeatedKeys as error:
        lines = "\n  ".join(str(error).splitlines())
        raise InputError(f"{path}: the same field is given more than once:\n  {lines}") from None
    except yaml.MarkedYAMLError as error:  # which would quote the line, with the password that may stand in it
        at = error.problem_mark
        where = f"line {at.line + 1}, column {at.column + 1}: " if at else ""
        raise InputError(f"{path}: is no YAML: {where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: is no YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not fields with values")
    return value


def argument(check: Callable[[str], Checked]) -> Callable[[str], Checked]:
    """The type of a command's argument: what `check` says is wrong is the message."""

    def checked(text: str) -> Checked:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


place = argument(lambda text: Path(str(expanded_place(text))))
"""Type of an argument that is a path, with `~` and `$NAME` as a shell reads them."""

place_or_url = argument(location)
"""The same of one that may also be a URL of a bucket."""


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
    return InputError(f"{count} in {source}:\n" + "\n".join(lines) + "\nsee --help-all for every field")


def _meant(field: str, schema: type[BaseModel]) -> str:
    """Where a field of about this name is: those beside it first, then the same name elsewhere, then like ones."""
    inside, _, name = field.rpartition(".")
    paths = [path.rpartition(".") for path, _ in fields_of(schema)]
    beside = [last for parent, _, last in paths if parent == inside]
    elsewhere = [last for _, _, last in paths]
    near = difflib.get_close_matches(name, beside, n=3, cutoff=0.75)
    if near:
        best = [f"{inside}.{last}".lstrip(".") for last in near]
    else:
        near = [name] if name in elsewhere else difflib.get_close_matches(name, set(elsewhere), n=3, cutoff=0.75)
        best = ["".join(path) for last in near for path in paths if path[2] == last][:3]
    return f"; did you mean {' or '.join(best)}?" if best else ""


def fields_of(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field by its path, with those of the parts: `budget`, `budget.trials`, ..."""
    for name, field in schema.model_fields.items():
        yield prefix + name, field
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from fields_of(field.annotation, f"{prefix}{name}.")


class _Paragraphs(argparse.HelpFormatter):
    """Fills paragraphs as wide as the terminal; indented lines, such as examples, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in text.strip().split("\n\n"))


def command_parser(program: str, description: str | None, *examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends with examples."""
    return argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=examples_of(examples),
        formatter_class=_Paragraphs,
        allow_abbrev=False,
    )


def examples_of(commands: Sequence[str]) -> str:
    """The last or first lines of a help."""
    return "\n".join(["examples:", *(f"  {command}" for command in commands)])


def config_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """Of a command about one trial."""
    parser = command_parser(program, description, f"{program} config.yaml")
    parser.add_argument("config", type=place, help="YAML file with the fields of TrialConfig; an empty file is a trial")
    return parser


def read_config(path: Path) -> TrialConfig:
    """The trial configuration of a file.

    Raises:
        InputError: with all its mistakes.
    """
    try:
        return TrialConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise all_mistakes(error, TrialConfig, str(path)) from None
