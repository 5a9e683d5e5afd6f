"""Knobs: what is searched, and how Optuna draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from trainables.config import Model, Point
from trainables.fields import parse_epsilon

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


def check_space(space: Space) -> list[str]:
    """Everything that is wrong with a space, as messages for the user; empty if it can be used.

    Besides names and conditions, the corners of every knob are tried as a `Point`.
    """
    problems = []
    earlier: set[str] = set()
    for name, knob in space.items():
        where = f"space.{name}"
        if name not in Point.model_fields:
            problems.append(f"{where}: no such knob; knobs are {', '.join(Point.model_fields)}")
            continue
        if knob.above_zero is not None and knob.above_zero not in earlier:
            problems.append(f"{where}.above_zero: {knob.above_zero!r} is no earlier knob; those are {sorted(earlier)}")
        earlier.add(name)
        corners: Sequence[Value | None] = knob.choices if knob.choices is not None else (knob.low, knob.high)
        for value in corners:
            try:
                Point.__pydantic_validator__.validate_assignment(Point.model_construct(), name, value)
            except ValueError as error:
                if "attack_steps" in str(error) or "epsilon" in str(error):
                    continue  # the pair is checked below
                problems.append(f"{where}: {value!r} is out of range: {str(error).splitlines()[2].strip()}")
    if "epsilon" in space and "attack_steps" in space and space["attack_steps"].above_zero != "epsilon":
        problems.append("space.attack_steps: needs above_zero: epsilon, because there are no steps without a radius")
    return problems


def suggest(space: Space, trial: optuna.Trial) -> dict[str, Value]:
    """Draw every knob that exists under the values before it."""
    params: dict[str, Value] = {}
    for name, knob in space.items():
        if _exists(knob, params):
            params[name] = knob.suggest(name, trial)
    return params


def _exists(knob: Knob, params: Mapping[str, Any]) -> bool:
    if knob.above_zero is None:
        return True
    value = params.get(knob.above_zero, 0)
    return isinstance(value, int | float) and not math.isclose(value, 0, abs_tol=1e-12)


def params_of(space: Space, point: Point) -> dict[str, Value] | None:
    """The point as parameters of the space, or None where it lies outside.

    A point lies outside if a knob cannot take its value, or if a field that is not searched differs from the default.
    """
    values = point.model_dump()
    params: dict[str, Value] = {}
    for name, knob in space.items():
        if _exists(knob, params):
            if not knob.contains(values[name]):
                return None
            params[name] = values[name]
    defaults = Point.model_construct().model_dump()
    others = set(values) - set(space) - ({"attack_steps"} if values["epsilon"] == 0 else set())
    return None if any(values[name] != defaults[name] for name in others) else params
