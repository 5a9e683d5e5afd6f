"""What `--help` prints where flags are the fields of a schema: the values in effect, and not all at once."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainables.cli.command import examples_of, fields_of
from trainables.files import Location

UNITS = {
    *("captions", "candidates", "epochs", "failures", "hours", "images", "layers", "minutes", "pixels", "samples"),
    *("seconds", "steps", "tokens", "trials", "words"),
}
"""What a field counts or measures, where its name ends with it."""

WIDEST = 44
"""Columns of a flag with what it takes, before its value begins."""


def asked(given: Sequence[str]) -> tuple[str | None, list[str]]:
    """Which help the flags ask for, and the other flags.

    Returns:
        None for none, "" for the short one, a group's name, or "all".

    Example:
        >>> asked(["--preset", "coco_blip", "--help", "budget"])
        ('budget', ['--preset', 'coco_blip'])
    """
    for place, flag in enumerate(given):
        rest = [*given[:place], *given[place + 1 :]]
        if flag == "--help-all":
            return "all", rest
        if flag in ("-h", "--help"):
            group = rest[place] if place < len(rest) and not rest[place].startswith("-") else ""
            return group, rest[:place] + rest[place + bool(group) :]
    return None, list(given)


def groups_of(schema: type[BaseModel]) -> dict[str, list[tuple[str, FieldInfo]]]:
    """The fields that have a flag, by the part they belong to; those of the whole under ""."""
    found: dict[str, list[tuple[str, FieldInfo]]] = {}
    for path, field in fields_of(schema):
        if not _is_part(field):
            found.setdefault(path.rpartition(".")[0], []).append((path, field))
    return found


def help_text(
    schema: type[BaseModel],
    group: str,
    values: Mapping[str, Any],
    *,
    program: str,
    common: Sequence[str],
    examples: Sequence[str],
    width: int,
) -> str:
    """The help of a command.

    Args:
        schema: of its fields.
        group: "" for the fields used most (all of them, where none are), "all", or a part of the schema.
        values: in effect, by path.
        program: as it is called.
        common: paths of the fields used most.
        examples: whole commands.
        width: of the terminal, columns.

    Raises:
        KeyError: there is no such group.
    """
    groups = groups_of(schema)
    named = {_title(name): name for name in groups}
    if not group and not common:
        group = "all"
    if group not in ("", "all") and not any(title == group or title.startswith(f"{group}.") for title in named):
        raise KeyError(f"no group {group!r}; groups are {', '.join(named)}")
    lines = [f"usage: {program} [--FLAG VALUE ...]", ""]
    if group in ("", "all"):
        for part in (inspect.getdoc(schema) or "").split("\n\n"):
            lines += [*textwrap.wrap(" ".join(part.split()), width), ""]
        lines += [examples_of(examples), ""]
    if not group:
        fields = dict(field for part in groups.values() for field in part)
        lines += ["most used, with the values in effect:", ""]
        lines += [line for path in common for line in _lines(path, fields[path], values, width)]
        lines += ["", "--help GROUP shows one of these, --help-all shows all:", ""]
        wide = max(map(len, named))
        for title, name in named.items():
            first = f"  {title:{wide}} {len(groups[name]):3} flags  "
            lines += textwrap.wrap(
                _about(schema, name), width, initial_indent=first, subsequent_indent=" " * len(first)
            )
        return "\n".join(lines)
    for title, name in named.items():
        if group == "all" or title == group or title.startswith(f"{group}."):
            heading = f"{title}: {_about(schema, name)}" if len(named) > 1 else "all flags, with the values in effect:"
            lines += [*textwrap.wrap(heading, width), ""]
            lines += [line for path, field in groups[name] for line in _lines(path, field, values, width)]
            lines.append("")
    return "\n".join(lines).rstrip()


def _lines(path: str, field: FieldInfo, values: Mapping[str, Any], width: int) -> Iterable[str]:
    """A flag with what it takes and its value, and below what it means and what is accepted."""
    takes = _takes(path, field)
    flag = path.replace("_", "-")
    head = f"  --[no-]{flag}" if takes == "" else f"  --{flag} {takes}"
    shown = "is required" if field.is_required() else in_words(values.get(path), path)
    room = textwrap.wrap(shown, max(20, width - WIDEST - 2)) or [""]
    if len(head) > WIDEST:
        yield head
        head = ""
    for number, part in enumerate(room):
        yield f"{head if number == 0 else '':{WIDEST}}  {part}".rstrip()
    limits = _accepted(field)
    meaning = (field.description or "") + (f" ({limits})" if limits else "")
    yield from textwrap.wrap(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def in_words(value: Any, path: str = "") -> str:
    """A value as one would write or read it.

    Example:
        >>> in_words(2 / 255, "protocol.epsilon"), in_words(None), in_words(("mat", "fare"))
        ('2/255', 'empty', 'mat, fare')
    """
    if value is None or value in ((), {}):
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{255 * value:.4g}/255" if path.endswith("epsilon") else f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    return str(value)


def _takes(path: str, field: FieldInfo) -> str:
    """The placeholder of a flag's value; nothing for a switch."""
    kind, name = _kind(field), path.rpartition(".")[2]
    if kind is bool:
        return ""
    if name.endswith("epsilon"):
        return "RADIUS"
    if kind in (Path, Location):
        return "PATH"
    if get_origin(kind) is Literal:
        return "NAME"
    if get_origin(kind) is tuple:
        item = _bare(get_args(kind)[0])
        return "A,B,..." if item in (str, int) or get_origin(item) is Literal else "JSON"
    if get_origin(kind) is dict:
        return "NAME=X" if _bare(get_args(kind)[1]) is float else "JSON"
    if (unit := name.rpartition("_")[2]) in UNITS:
        return unit.upper()
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _accepted(field: FieldInfo) -> str:
    """Which values a field takes, by its constraints."""
    kind = _kind(field)
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple and get_origin(item := _bare(get_args(kind)[0])) is Literal:
        return ", ".join(map(str, get_args(item)))
    words = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
    bounds = [
        word.format(bound)
        for name, word in words.items()
        for part in field.metadata
        if (bound := getattr(part, name, None)) is not None
    ]
    return " ".join(bounds)


def _kind(field: FieldInfo) -> Any:
    return _bare(field.annotation)


def _bare(kind: Any) -> Any:
    """Of what may be left empty, or is annotated, the type itself."""
    if hasattr(kind, "__metadata__"):
        return _bare(kind.__origin__)
    given = [part for part in get_args(kind) if part is not type(None)]
    return _bare(given[0]) if type(None) in get_args(kind) and len(given) == 1 else kind


def _is_part(field: FieldInfo) -> bool:
    return inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)


def _title(name: str) -> str:
    return name.replace("_", "-") or "general"


def _about(schema: type[BaseModel], name: str) -> str:
    """The first sentence of a part's description."""
    if not name:
        return "everything that is in no part"
    of = dict(fields_of(schema))[name].annotation
    text = " ".join((inspect.getdoc(of) or "").split())
    return text[0].lower() + text[1:].partition(". ")[0].removesuffix(".")


def values_of(model: BaseModel) -> dict[str, Any]:
    """Every value of a model by the path of its field."""
    found: dict[str, Any] = {}
    for path, _ in fields_of(type(model)):
        value: Any = model
        for name in path.split("."):
            value = getattr(value, name)
        found[path] = value
    return found
