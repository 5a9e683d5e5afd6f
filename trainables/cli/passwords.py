"""Passwords do not stay on a command line, which every user of the machine can read, and Ray keeps."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from trainables.errors import has_password

VARIABLES = {"--tracking-uri": "PARETOVL_TRACKING__URI"}
"""Of flags that are called otherwise than the field they give."""


def handed_over(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Flags whose values hold a password, as variables instead.

    Args:
        arguments: of a command, in which a flag and its value may be one word or two.

    Returns:
        The other arguments, and the variables.

    Example:
        >>> handed_over(["--name", "mine", "--storage", "postgresql://me:hush@db/x"])
        (['--name', 'mine'], {'PARETOVL_STORAGE': 'postgresql://me:hush@db/x'})
    """
    kept: list[str] = []
    variables: dict[str, str] = {}
    for word in arguments:
        flag, equals, value = word.partition("=")
        if not word.startswith("--"):
            flag, value = (kept[-1] if kept else ""), word
        elif not equals:
            value = ""
        if flag.startswith("--") and has_password(value):
            if not word.startswith("--"):
                kept.pop()
            name = VARIABLES.get(flag, "PARETOVL_" + flag[2:].upper().replace(".", "__").replace("-", "_"))
            variables[name] = value
        else:
            kept.append(word)
    return kept, variables


def hide_passwords() -> None:
    """Begin this process again, once, without the passwords that its command line holds."""
    kept, variables = handed_over(sys.argv[1:])
    if variables:
        program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
        os.execve(sys.executable, [*program, *kept], {**os.environ, **variables})
