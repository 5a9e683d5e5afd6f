"""Commands as people type them, read by the parsers that they would meet."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence
from typing import Any

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
        parser: Any = importlib.import_module(module).parser()
        if module in ("benchmarks.recipes", "study.submit"):  # they hand on what they do not know
            _, rest = parser.parse_known_args(given)
            parse(rest)
        else:
            parser.parse_args(given)
    return module, given


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
