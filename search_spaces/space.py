"""Knobs: what is searched, and how Optuna draws it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import combinations, product
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from trainables.config import Model, Point
from trainables.config.fields import parse_epsilon

if TYPE_CHECKING:
    import optuna

Value = bool | int | float | str
Bound = Annotated[float, BeforeValidator(parse_epsilon)]


class Knob(Model):
    """One searched dimension. It is named like the field of `Point` that it sets, and bounds may be written 8/255."""

    kind: Literal["float", "int", "choice"]
    low: Bound | None = Field(None, description="smallest value of a float or int")
    high: Bound | None = Field(None, description="largest value of a float or int")
    log: bool = Field(False, description="draw uniformly in the logarithm")
    choices: tuple[Value, ...] | None = Field(None, description="the values of a choice")
    above_zero: str | None = Field(None, description="an earlier knob; this one exists only where that is above zero")
    below_one: str | None = Field(None, description="an earlier knob; this one exists only where that is below one")

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> Knob:
        if self.kind == "choice":
            if not self.choices or len(set(self.choices)) != len(self.choices):
                raise ValueError("a choice needs `choices`, each once")
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("a choice has no low, high or log")
            return self
        if self.choices is not None:
            raise ValueError(f"a {self.kind} has low and high, no choices")
        if self.low is None or self.high is None or not self.low <= self.high:
            raise ValueError(f"a {self.kind} needs low <= high, got low={self.low}, high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low > 0, got {self.low}")
        if self.kind == "int" and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"an int needs whole bounds, got low={self.low}, high={self.high}")
        return self

    def __str__(self) -> str:
        if self.kind == "choice":
            drawn = "|".join(
                str(value).lower() if isinstance(value, bool) else str(value) for value in self.choices or ()
            )
        else:
            drawn = f"{self.low:.4g}..{self.high:.4g}" + (" log" if self.log else "")
        return drawn + (f" where {self.above_zero} > 0" if self.above_zero else "")

    def suggest(self, name: str, trial: optuna.Trial) -> Value:
        """Draw a value, or take the one the trial was enqueued with."""
        if self.kind == "choice":
            return cast(Value, trial.suggest_categorical(name, self.choices or ()))
        if self.kind == "int":
            return trial.suggest_int(name, int(self.low or 0), int(self.high or 0), log=self.log)
        return trial.suggest_float(name, self.low or 0.0, self.high or 0.0, log=self.log)

    def contains(self, value: Value) -> bool:
        """Whether the knob can take this value."""
        if self.kind == "choice":
            return value in (self.choices or ())
        inside = isinstance(value, int | float) and (self.low or 0.0) <= value <= (self.high or 0.0)
        return inside and (self.kind == "float" or float(value).is_integer())


Space = Mapping[str, Knob]
"""Knobs by name, in the order they are drawn."""


def typed(name: str, value: Value) -> Value:
    """A value as the field of `Point` that the knob sets has it: `"1/255"` is a radius, `2.0` steps are 2.

    Raises:
        ValueError: the field does not take it.
    """
    try:
        return cast(Value, _field(name).validate_python(value))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"{value!r} is out of range: {reason}") from None


@cache
def _field(name: str) -> TypeAdapter[Any]:
    field = Point.model_fields[name]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(kind)


def typed_space(space: Space) -> dict[str, Knob]:
    """The space with its choices as `typed`; those that cannot be are left for `check_space` to tell."""
    found = {}
    for name, knob in space.items():
        with suppress(ValueError, KeyError):
            if knob.choices is not None:
                knob = knob.model_copy(update={"choices": tuple(typed(name, choice) for choice in knob.choices)})
        found[name] = knob
    return found


def check_space(space: Space) -> list[str]:
    """Everything that is wrong with a space, as messages for the user; empty if every draw is a `Point`."""
    problems = _wrong_knobs(space)
    if problems:
        return problems
    found: dict[str, dict[str, Value]] = {}
    for params in corners(space):
        try:
            Point.model_validate(params)
        except ValidationError as error:
            for reason in error.errors()[0]["msg"].removeprefix("Value error, ").split("; "):
                found.setdefault(reason, params)
    return [f"{reason} ({example_of(params)})" for reason, params in found.items()]


def example_of(params: Mapping[str, Value]) -> str:
    """How a message shows a draw."""
    return "for example at " + _shown(params)


def _shown(params: Mapping[str, Value]) -> str:
    written = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in params.items()}
    return ", ".join(f"{name} {value}" for name, value in written.items())


def _wrong_knobs(space: Space) -> list[str]:
    """What is wrong with single knobs and their conditions."""
    problems = []
    earlier: set[str] = set()
    for name, knob in space.items():
        where = f"space.{name}"
        if name not in Point.model_fields:
            problems.append(f"{where}: no such knob; knobs are {', '.join(Point.model_fields)}")
            continue
        for condition in ("above_zero", "below_one"):
            parent = getattr(knob, condition)
            if parent is not None and parent not in earlier:
                known = ", ".join(sorted(earlier)) or "none"
                problems.append(f"{where}.{condition}: {parent!r} is no earlier knob with numbers; those are {known}")
        if not isinstance(Point.model_fields[name].default, str):
            earlier.add(name)
        choices = knob.choices or ()
        for value in choices or _values(name, knob):
            try:
                typed(name, value)
            except ValueError as error:
                problems.append(f"{where}: {error}")
        if len(set(choices)) < len(choices):
            problems.append(f"{where}: some of the choices are the same value: {', '.join(map(str, choices))}")
    if "epsilon" in space and "attack_steps" not in space:
        example = "{kind: choice, choices: [2, 10], above_zero: epsilon}"
        problems.append(f"space.epsilon: a radius needs steps; add attack_steps: {example}")
    elif "epsilon" in space and space["attack_steps"].above_zero != "epsilon":
        problems.append("space.attack_steps: needs above_zero: epsilon, because there are no steps without a radius")
    return problems


TOGETHER = 3
"""Fields that a rule of `Point` or `TrialConfig` is about at most."""


def corners(space: Space) -> Iterator[dict[str, Value]]:
    """Draws that break every rule that some draw of the space breaks, if there are any such.

    They are all combinations of the ends (and a value between) of each few knobs, the others standing where those that
    depend on them exist. Rules are about few fields each, and compare numbers with each other, 0 or 1, so they break at
    ends if anywhere.
    """
    values = {name: _values(name, knob) for name, knob in space.items()}
    standing, seen = _standing(space), set()
    for chosen in combinations(space, min(TOGETHER, len(space))):
        for picked in product(*(values[name] for name in chosen)):
            params = _existing(space, {**standing, **dict(zip(chosen, picked, strict=True))})
            if tuple(params.items()) not in seen:
                seen.add(tuple(params.items()))
                yield params


def _standing(space: Space) -> dict[str, Value]:
    """A value for every knob under which those that depend on it exist, where there is one."""
    return {name: _middle(_values(name, knob)) for name, knob in space.items()}


def _values(name: str, knob: Knob) -> list[Value]:
    """The least, the largest, and one between; of what is no number, all."""
    if knob.choices is None:
        low, high = knob.low or 0.0, knob.high or 0.0
        return [int(low), int(high)] if knob.kind == "int" else [low, low + 0.382 * (high - low), high]
    if not all(isinstance(choice, int | float) for choice in knob.choices):
        return list(knob.choices)
    ordered = sorted(knob.choices, key=float)
    return list(dict.fromkeys([ordered[0], _middle(ordered), ordered[-1]]))


def _middle(values: Sequence[Value]) -> Value:
    return values[len(values) // 2]


def suggest(space: Space, trial: optuna.Trial) -> dict[str, Value]:
    """Draw every knob that exists under the values before it."""
    params: dict[str, Value] = {}
    for name, knob in space.items():
        if _exists(knob, params):
            params[name] = knob.suggest(name, trial)
    return params


def is_draw(space: Space | None, params: Mapping[str, Any]) -> bool:
    """Whether the parameters are a point with exactly the knobs that exist under them; None: of whatever space."""
    try:
        Point.model_validate(params)
    except ValidationError:
        return False
    return space is None or params.keys() == {name for name, knob in space.items() if _exists(knob, params)}


def is_inside(space: Space, params: Mapping[str, Any]) -> bool:
    """Whether a trial with the parameters could have been drawn from the space."""
    return is_draw(space, params) and all(space[name].contains(value) for name, value in params.items())


def _existing(space: Space, values: Mapping[str, Value]) -> dict[str, Value]:
    params: dict[str, Value] = {}
    for name, knob in space.items():
        if _exists(knob, params):
            params[name] = values[name]
    return params


def _exists(knob: Knob, params: Mapping[str, Any]) -> bool:
    def value(name: str) -> float:
        return float(params.get(name, Point.model_fields[name].default))

    return (knob.above_zero is None or value(knob.above_zero) > 0) and (
        knob.below_one is None or value(knob.below_one) < 1
    )


def wrong_point(space: Space, point: Mapping[str, Value]) -> list[str]:
    """Everything that is wrong with a point that is given to try, as messages; knobs may be left out."""
    unknown = [name for name in point if name not in space]
    if unknown:
        return [f"{', '.join(unknown)} is not in the space, whose knobs are {', '.join(space)}"]
    problems = []
    for name, value in point.items():
        try:
            inside = space[name].contains(typed(name, value))
        except ValueError:
            inside = False
        if not inside:
            problems.append(f"{name}={value!r} is not in the space")
        elif not _exists(space[name], {**_standing(space), **point}):
            problems.append(f"{name} does not exist at {_shown(point)}: leave it out")
    return problems


def params_of(space: Space, point: Point) -> dict[str, Value] | None:
    """The point as parameters of the space, or None where it lies outside.

    A point lies outside if a knob cannot take its value, or if a field that is not searched differs from the default.
    """
    values = point.model_dump()
    params = _existing(space, values)
    if not all(space[name].contains(value) for name, value in params.items()):
        return None
    return params if Point.model_validate(params) == point else None
