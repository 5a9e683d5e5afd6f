"""Every field of a schema as a command-line flag and as a `PARETOVL_...` variable."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from trainables.cli.command import all_mistakes, fields_of
from trainables.cli.help import asked, help_text, values_of
from trainables.config.fields import Separated
from trainables.errors import InputError

PREFIX = "PARETOVL_"
NOT_OURS = "PARETOVL_TEST_"
"""Variables of the tests."""


class Variables(EnvSettingsSource):
    """Of the environment. What is no JSON is for the field to read: a list may be written with commas."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """JSON, or the text itself."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class Flags(BaseSettings):
    """Base of what a command takes. Later wins: values of the constructor, variables, flags."""

    common_fields: ClassVar[tuple[str, ...]] = ()
    """Paths of the fields that are used most; `--help` shows them first."""
    example_commands: ClassVar[tuple[str, ...]] = ()
    """Whole commands."""
    decided_later: ClassVar[Mapping[str, str]] = {}
    """By path: what decides a field that is not given."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
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
        return Variables(settings_cls), init_settings


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
    group, given = asked(given)
    if group is not None:
        _print_help(schema, group, given, values)
        raise SystemExit(0)
    refuse_unknown_variables(schema, os.environ)
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            return schema(_cli_parse_args=_with_commas(schema, given), **values)
    except SystemExit as stop:
        if stop.code:
            raise _flag_mistake(usage.getvalue()) from None
        raise
    except ValidationError as error:
        raise all_mistakes(error, schema, what) from None
    except SettingsError as error:
        field = re.findall(r'"(.+?)"', str(error))[:1]
        raise InputError(
            f"{', '.join(field) or 'command line'}: cannot be read ({error.__cause__ or error}); a list or mapping is "
            'written as JSON here, such as \'[{"epsilon": "2/255"}]\', or as YAML in a --config file'
        ) from None


def _with_commas(schema: type[Flags], given: Sequence[str]) -> list[str]:
    """The flags, with the blanks within a list as the commas that `pydantic_settings` takes; JSON is left alone."""
    lists = {"--" + path.replace("_", "-") for path, field in fields_of(schema) if Separated in field.metadata}
    found, flag = [], ""
    for argument in given:
        flag, sign, value = argument.partition("=") if argument.startswith("--") else (flag, " ", argument)
        if sign and flag in lists and not value.startswith(("[", "{")):
            argument = argument.removesuffix(value) + re.sub(r"[,\s]+", ",", value.strip())
        found.append(argument)
    return found


def _print_help(schema: type[Flags], group: str, given: Sequence[str], values: Mapping[str, Any]) -> None:
    """The help with what the other flags, variables and values make of the fields.

    Raises:
        InputError: there is no such group.
    """
    required = {name: name.upper() for name, field in schema.model_fields.items() if field.is_required()}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            effective = values_of(schema(_cli_parse_args=_with_commas(schema, given), **{**required, **values}))
    except (SystemExit, ValidationError, SettingsError):  # what is wrong is told without --help; here it may be unknown
        effective = {path: field.get_default(call_default_factory=True) for path, field in fields_of(schema)}
    defaults = {path: field.default for path, field in fields_of(schema)}
    effective |= {path: by for path, by in schema.decided_later.items() if effective[path] == defaults[path]}
    try:
        text = help_text(
            schema,
            group,
            effective,
            program=schema.model_config.get("cli_prog_name") or "",
            common=schema.common_fields,
            examples=schema.example_commands,
            width=shutil.get_terminal_size().columns,
        )
    except KeyError as error:
        raise InputError(f"--help: {error.args[0]}") from None
    print(text)


def refuse_unknown_variables(schema: type[BaseModel], environment: Mapping[str, str]) -> None:
    """What begins like ours sets a field, or it is a mistake that nobody would see.

    A variable that is like no field is told and left out: it may be another command's.

    Raises:
        InputError: there are variables that nearly name a field, with that field.
    """
    fields = {PREFIX + path.replace(".", "__").upper(): field for path, field in fields_of(schema)}
    bare = {_bare(name): name for name in fields}
    lines = []
    for name in sorted(environment):
        known = name.upper()
        if not known.startswith(PREFIX) or known.startswith(NOT_OURS):
            continue
        parents = (known.rsplit("__", depth)[0] for depth in range(1, 1 + known.count("__")))
        if known in fields or any(_has_parts(fields[parent]) for parent in parents if parent in fields):
            continue  # what is wrong within a part, its own schema says
        near = difflib.get_close_matches(_bare(known), bare, n=1, cutoff=0.85)
        if near:
            lines.append(f"  {name}: sets no field; did you mean {bare[near[0]]}?")
        else:
            print(f"note: the variable {name} sets no field of this command and is left out", file=sys.stderr)
    if lines:
        raise InputError("\n".join(["environment variables, two underscores between a part and its field:", *lines]))


def _bare(variable: str) -> str:
    return variable.removeprefix(PREFIX).replace("_", "")


def _has_parts(field: FieldInfo) -> bool:
    kind = field.annotation
    return get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, BaseModel))


def _flag_mistake(told: str) -> InputError:
    """What argparse told, without the usage of two screens, and with the flags that may have been meant."""
    usage, _, reason = told.rstrip().rpartition(" error: ")
    known = set(re.findall(r"--[\w.-]+", usage))
    lines = [f"command line: {reason}"]
    if reason.startswith("unrecognized arguments") and not re.search(r"(?<!\S)-", reason):
        lines.append("  is that a list? Its items are written with commas and no blanks between: --recipes mat,fare")
    for flag in re.findall(r"(?<!\S)--[\w.-]+", reason):
        close = difflib.get_close_matches(flag.replace("_", "-"), known, n=3)
        if close and flag not in known:
            lines.append(f"  {flag}: did you mean {' or '.join(close)}?")
    return InputError("\n".join([*lines, "  --help-all lists every flag"]))
