"""What Ray needs of this machine, looked at before it starts: it would tell by a traceback, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from trainables.errors import InputError

SOCKET = "ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
"""The longest of the names that Ray makes in its folder."""

SOCKET_BYTES = 107
"""Of a Unix socket's path, at most."""

TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables that give Ray a token."""


def ray_folder() -> Path:
    """Where Ray keeps sockets and logs of this machine; made where there is none.

    Raises:
        InputError: it cannot be written, is too long for sockets, or Ray's token has no place.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    folder = Path(os.environ[name] if name else "/tmp")
    said = f"{name or 'RAY_TMPDIR'}: Ray keeps sockets in {folder}, "
    beyond = len(os.fsencode(folder / SOCKET)) - SOCKET_BYTES
    if beyond > 0:
        raise InputError(f"{said}whose path is {beyond} bytes too long for them; set RAY_TMPDIR to a shorter one: /tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{said}which cannot be written ({error.strerror}); set RAY_TMPDIR to another folder"
        ) from None
    _place_for_the_token()
    return folder


def _place_for_the_token() -> None:
    token = Path.home() / ".ray" / "auth_token"
    if any(os.environ.get(name) for name in TOKENS) or token.exists():
        return
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=token.parent):
            pass
    except OSError as error:
        raise InputError(
            f"HOME: {token.parent} cannot be written ({error.strerror}), where Ray keeps the token that admits to it; "
            "set HOME to a folder of yours, or RAY_AUTH_TOKEN_PATH to a file with a token"
        ) from None
