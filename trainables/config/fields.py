"""Kinds of values that schemas share, as people write them: radii, names, seeds, places, lists."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Model(BaseModel):
    """Base of every schema here: unknown fields are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def content_hash(value: BaseModel | dict[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the value's canonical JSON."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def raise_all(problems: Iterable[str]) -> None:
    """One ValueError with all problems, if there are any."""
    told = "; ".join(problems)
    if told:
        raise ValueError(told)


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LONGEST_NAME = 100
"""Characters of a study's or an attack's name. With what is put behind it (a trial's number, a metric, a temporary
file's ending) it stays below what file systems (255), MLflow (250) and databases take."""
LONGEST_KEY = LONGEST_NAME + 20
"""Of a trial: the study's name with number and replicate, `-t00042-s0`."""

SEEDS = 2**32
"""How many there are."""


def parse_epsilon(value: object) -> object:
    """Let radii be written as the papers do, `2/255`; everything else is left to pydantic.

    Example:
        >>> parse_epsilon("4/8")
        0.5
    """
    if isinstance(value, str) and value.count("/") == 1:
        over, under = value.split("/")
        try:
            return float(over) / float(under)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{value!r} is no number; write a radius in [0, 1] as 0.0078 or 2/255") from None
    return value


def check_name(value: str, longest: int = LONGEST_NAME) -> str:
    """A name that can be part of a path, a database and a metric everywhere.

    Raises:
        ValueError: it cannot.
    """
    if not NAME.fullmatch(value):
        raise ValueError("use letters a-z, digits, dot, dash and underscore, starting with a letter or digit")
    if len(value) > longest:
        raise ValueError(f"a name has at most {longest} characters, this one has {len(value)}")
    return value


def expanded(value: object) -> object:
    """A path with `~` and `$NAME` as a shell reads them; what is no text is left alone.

    Raises:
        ValueError: it is empty, or speaks of a home or a variable that does not exist.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("is empty; give a path or a name, or leave the field out")
    path = os.path.expandvars(os.path.expanduser(value))
    missing = re.search(r"\$\w+|\$\{[^}]*\}", path)
    if missing:
        raise ValueError(f"the variable {missing[0]} is not set")
    if path.startswith("~"):
        raise ValueError(f"there is no home of {path.split('/')[0]}")
    return path


def expanded_place(value: object) -> object:
    """`expanded` for what has to be on a disk.

    Raises:
        ValueError: it is a URL, or as there.
    """
    value = expanded(value)
    if isinstance(value, str) and "://" in value:
        if not value.startswith("file:///"):
            raise ValueError("is a URL; give a path that every machine has")
        return value.removeprefix("file://")
    return value


def expanded_url(value: object) -> object:
    """`expanded` for what is a file: a plain path, `sqlite:///PATH`. Passwords of other URLs may have any sign."""
    if not isinstance(value, str) or ("://" in value and not value.startswith(("sqlite:", "file:"))):
        return value
    scheme, slashes, path = value.rpartition(":///")
    return f"{scheme}{slashes}{expanded(path)}"


def separated(value: object) -> object:
    """A list that was written as one text, with commas or blanks between; anything else is left alone.

    Example:
        >>> separated("mat, fare"), separated("mat fare"), separated(["mat"])
        (['mat', 'fare'], ['mat', 'fare'], ['mat'])
    """
    return re.findall(r"[^,\s]+", value) if isinstance(value, str) else value


Epsilon = Annotated[float, BeforeValidator(parse_epsilon), Field(ge=0, le=1)]
"""An L-infinity radius in [0, 1] pixels, before any normalisation."""
Name = Annotated[str, AfterValidator(check_name)]
"""Of a study or an attack."""
Key = Annotated[str, AfterValidator(lambda value: check_name(value, LONGEST_KEY))]
"""Of a trial."""
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
"""Every generator here takes it (NumPy's and Optuna's no larger, none a negative one), and no two are the same."""
Place = Annotated[Path, BeforeValidator(expanded_place)]
"""A file or folder."""
PlaceOrName = Annotated[str, BeforeValidator(expanded)]
"""A hub id, folder or file; a built-in part, or the file of one."""
Url = Annotated[str, BeforeValidator(expanded_url)]
"""Of a database, a server, or a storage that may be a path."""
Separated = BeforeValidator(separated)
