"""What is wrong with what people give, and how it is said."""

from __future__ import annotations

import re


class InputError(ValueError):
    """Input that cannot be used; its text is the whole message for the user. Exit code 2."""


UNSAFE = re.compile(r"weights.only|trust_remote_code|allow_pickle|custom code", re.IGNORECASE)
"""Words in which libraries advise to turn their checks off."""


def reason(error: BaseException) -> str:
    """What a library says is wrong, in one line, and never its advice to turn a check off.

    Example:
        >>> reason(ValueError("Please pass `trust_remote_code=True`."))
        'it would have to run code that comes with it, which is never done here'
    """
    if UNSAFE.search(str(error)):
        return "it would have to run code that comes with it, which is never done here"
    line = next(filter(None, map(str.strip, str(error).splitlines())), "")
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError) or not line else line


def redacted(text: str) -> str:
    """The text without the passwords of the URLs in it.

    Example:
        >>> redacted("postgresql://me:secret@db:5432/mlflow")
        'postgresql://me:***@db:5432/mlflow'
    """
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"(password=)[^&\s]+", r"\1***", text)
