"""What is wrong with what people give, and how it is said."""

from __future__ import annotations

import re


class InputError(ValueError):
    """Input that cannot be used; its text is the whole message for the user. Exit code 2."""


class Away(InputError):
    """Something that is there as a rule, and does not answer now: the same command may be run again. Exit code 75."""


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


def counted(number: int, name: str) -> str:
    """A number of things, as a person says it.

    Example:
        >>> counted(1, "trial"), counted(2, "trial")
        ('1 trial', '2 trials')
    """
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


_USER = re.compile(r"(://[^:/?#@\s]*):(?:[^\s'\"]*)@")
_NAMED = re.compile(
    r"((?:^|[^\w])[\w.-]*(?:password|passwd|pwd|passphrase|token|secret|signature|sig|credential|api_?key|access_?key)=)"
    r"('[^']*'|[^&;\s'\"]+)",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """The text without the passwords of the URLs in it, in front of the host or among the parameters.

    Rather too much than too little: with several URLs in one word, all up to the last host is left out.

    Example:
        >>> redacted("postgresql://me:secret@db:5432/mlflow?sslpassword=hush&a=b")
        'postgresql://me:***@db:5432/mlflow?sslpassword=***&a=b'
    """
    return _NAMED.sub(r"\1***", _USER.sub(r"\1:***@", text))


def has_password(value: str) -> bool:
    """Whether a value is a URL with a password, which may have signs that would end it within a text.

    Example:
        >>> has_password("postgresql://me:it's mine@db/x"), has_password("postgresql://me@db/x")
        (True, False)
    """
    word = re.sub(r"[\s'\"]", "", value)
    return redacted(word) != word


def without_password(url: str) -> str:
    """A URL as it may be kept: what is asked for a password is left to those who know it.

    Example:
        >>> without_password("postgresql://me:secret@db:5432/mlflow?sslpassword=hush&a=b")
        'postgresql://me@db:5432/mlflow?a=b'
    """
    bare = re.sub(r"[^?&]*=\*\*\*(&|$)", "", redacted(url).replace(":***@", "@"))
    return bare.rstrip("?&")
