"""All mistakes of a configuration at once: pydantic tries a rule about a field only where all parts of it are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ModelWrapValidatorHandler, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

Checked = TypeVar("Checked")
Where = tuple[int | str, ...]
"""Where a value is among the fields."""


def check_all(given: Any, check: ModelWrapValidatorHandler[Checked], read: Mapping[str, Sequence[Where]]) -> Checked:
    """What was given, checked; where parts are wrong once more without them, so that they hide no other mistake.

    Args:
        given: fields by name.
        check: of pydantic.
        read: what the rules about a field as a whole read besides it, by the field's name.

    Raises:
        ValidationError: with all mistakes.
    """
    try:
        return check(given)
    except ValidationError as error:
        mistakes, title = error.errors(), error.title
    wrong = [mistake["loc"] for mistake in mistakes]
    try:
        check(_without(given, wrong))
    except ValidationError as error:
        mistakes += [mistake for mistake in error.errors() if _would_be_told(mistake, wrong, read)]
    lines = [
        InitErrorDetails(type=PydanticCustomError(m["type"], m["msg"]), loc=m["loc"], input=m["input"])
        for m in mistakes
    ]
    raise ValidationError.from_exception_data(title, lines) from None


def _without(value: Any, wrong: Sequence[Where]) -> Any:
    """What was given, but for what is at these places."""
    if not isinstance(value, dict | list | tuple):
        return value
    kept = {
        key: _without(part, [place[1:] for place in wrong if place[:1] == (key,)])
        for key, part in (value.items() if isinstance(value, dict) else enumerate(value))
        if (key,) not in wrong
    }
    return kept if isinstance(value, dict) else list(kept.values())


def _would_be_told(mistake: ErrorDetails, wrong: Sequence[Where], read: Mapping[str, Sequence[Where]]) -> bool:
    """Whether it is of a rule about a field as a whole, and would be the same if what is wrong were right."""
    field = mistake["loc"]
    besides = read.get(str(field[0])) if len(field) == 1 and field not in wrong else None
    apart = besides is not None and not any(one[: len(two)] == two[: len(one)] for one in wrong for two in besides)
    return apart and mistake["type"] == "value_error"
