"""Every field of a schema as a command-line flag and as a `PARETOVL_...` variable."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from trainables.command import InputError, all_mistakes


class Flags(BaseSettings):
    """Base of what a command takes. Later wins: values of the constructor, variables, flags."""

    model_config = SettingsConfigDict(
        env_prefix="PARETOVL_",
        env_nested_delimiter="__",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        extra="forbid",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Variables over what the constructor is given; the command line comes on top by itself."""
        return env_settings, init_settings


Parsed = TypeVar("Parsed", bound=Flags)


def from_command_line(schema: type[Parsed], given: Sequence[str], values: Mapping[str, Any], what: str) -> Parsed:
    """What flags, variables and values say together.

    Args:
        schema: of all fields.
        given: the flags.
        values: of fields, which variables and flags come over.
        what: is configured, for messages.

    Raises:
        InputError: with all mistakes at once.
        SystemExit: after --help.
    """
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            return schema(_cli_parse_args=list(given), **values)
    except SystemExit as stop:
        if stop.code:
            raise _flag_mistake(usage.getvalue()) from None
        raise
    except ValidationError as error:
        raise all_mistakes(error, schema, what) from None
    except SettingsError as error:
        raise InputError(str(error)) from None


def _flag_mistake(told: str) -> InputError:
    """What argparse told, without the usage of two screens, and with the flags that may have been meant."""
    usage, _, reason = told.rstrip().rpartition(" error: ")
    known = set(re.findall(r"--[\w.-]+", usage))
    lines = [f"command line: {reason}"]
    for flag in re.findall(r"(?<!\S)--[\w.-]+", reason):
        close = difflib.get_close_matches(flag.replace("_", "-"), known, n=3)
        if close and flag not in known:
            lines.append(f"  {flag}: did you mean {' or '.join(close)}?")
    return InputError("\n".join([*lines, "  --help lists every flag"]))
