"""Commands as people type them, read by the parsers that they would meet."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from botocore import xform_name

import study.cluster
import study.plan
import trainables.evaluate
from study.arguments import parse

WHOLE = {
    "study.cluster": study.cluster.parse,
    "study.run": parse,
    "study.plan": lambda given: parse(given, study.plan.Arguments),
    "trainables.evaluate": trainables.evaluate.parse,
}
"""Those whose flags are the fields of a schema."""


def read_command(line: str) -> tuple[str, list[str]]:
    """Module and flags of `python -m MODULE FLAGS`.

    Raises:
        InputError: a flag does not exist, or its value cannot be used.
        SystemExit: the same, of commands with few flags.
    """
    words = shlex.split(line)
    assert words[:2] == ["python", "-m"], line
    module, given = words[2], words[3:]
    if "--help" in given:
        given = given[: given.index("--help")]
    if module in WHOLE:
        WHOLE[module](given)
    else:
        found = importlib.import_module(module)
        whole = importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found
        parser: Any = whole.parser()
        if module in ("benchmarks.recipes", "study.submit"):  # they hand on what they do not know
            _, rest = parser.parse_known_args(given)
            parse(rest)
        else:
            parser.parse_args(given)
    return module, given


def read_line(line: str) -> None:
    """A line of a page: commands of this project, of MLflow and of Ray by their parsers, those of AWS by its API.

    Raises:
        Exception: one of them would be refused.
        KeyError: the program is none of these.
    """
    subprocess.run(["bash", "-n", "-c", line], check=True)
    for part in re.sub(r" > \S+$", "", line).split(" && "):
        words = shlex.split(part)
        if words[:2] == ["uv", "run"]:
            words = words[2:]
        if words[0] == "python":
            read_command(shlex.join(words))
        elif words[0] in ("mlflow", "ray"):
            read_by_click(words[0], words[1:])
            for text in (word for word in words if "python -m " in word):  # what another machine is to run
                read_command("python -m " + text.partition("python -m ")[2])
        elif words[0] == "aws":
            read_by_botocore(words[1:])
        elif words[:1] != ["pytest"] and words[:2] != ["pip", "install"] and words[:3] != ["uv", "pip", "install"]:
            raise KeyError(part)


def read_by_botocore(words: Sequence[str]) -> None:
    """A command of AWS, as far as its API knows: the operation, its required and its known fields.

    Raises:
        AssertionError: it has no such field, or lacks one.
        botocore.exceptions.UnknownServiceError: there is no such service.
    """
    import botocore.session

    service, operation, *rest = words
    session = botocore.session.get_session()
    given = {word[2:] for word in rest if word.startswith("--")} - {"region"}
    name = operation.title().replace("-", "")
    if operation == "wait":
        waiter = session.get_waiter_model(service).get_waiter(rest[0].title().replace("-", ""))
        name = waiter.operation
    shape = session.get_service_model(service).operation_model(name).input_shape
    members = {xform_name(member, "-"): member for member in shape.members}
    assert given <= members.keys(), given - members.keys()
    assert set(shape.required_members) <= {members[each] for each in given}, shape.required_members


def read_by_click(program: str, given: Sequence[str]) -> None:
    """A command of MLflow or Ray.

    Raises:
        click.UsageError: it has no such flag.
    """
    import click

    command: Any
    if program == "mlflow":
        from mlflow.cli import cli as command
    else:
        from ray.scripts.scripts import cli as command
    command.get_command(click.Context(command), given[0]).make_context(given[0], list(given[1:]))
