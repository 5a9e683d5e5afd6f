"""What may be typed for a cluster: it stands in YAML and in commands of a shell as it is, and has to mean the same."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator

from trainables.errors import has_password

PLAIN = re.compile(r"[\w.:/@+~=?%-]*", re.ASCII)


def plain(value: object) -> object:
    """A value that needs no quotes; of several, each, and none twice.

    Raises:
        ValueError: it would need them, holds a password, or is no number.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("give a number that is finite")
    if isinstance(value, tuple):
        for each in value:
            if not plain(each):
                raise ValueError("one of the list is empty")
        if len({*value}) < len(value):
            raise ValueError("one of the list is there twice")
    if isinstance(value, str | Path):
        text = str(value)
        if not PLAIN.fullmatch(text):
            raise ValueError("use letters, digits and ._:/@+~=?%- only, as it gets into commands without quotes")
        if text and yaml.safe_load(text) != text:
            raise ValueError("YAML reads it as something else than text; take another")
        if has_password(text):
            raise ValueError("holds a password, which the file would show to all; put it into ~/.pgpass")
    return value


def named_like(pattern: str, accepted: str) -> AfterValidator:
    """A check that text has a form, or is still to be filled in.

    Args:
        pattern: regular expression of the whole text.
        accepted: what has that form, in words.
    """

    def checked(value: str) -> str:
        if "FILL-IN" not in value and not re.fullmatch(pattern, value):
            raise ValueError(f"give {accepted}")
        return value

    return AfterValidator(checked)


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("give a path from / on, which is the same on all machines")
    return path


Folder = Annotated[Path, AfterValidator(_absolute)]
"""The same on all machines."""
Address = Annotated[
    str, named_like(r"(?!127\.|localhost)[\w.-]+", "an address by which other machines reach it, without user or port")
]
"""Of a machine."""
