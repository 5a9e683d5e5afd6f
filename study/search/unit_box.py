"""A space as a box: every knob on [0, 1], many points at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.random import Generator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces.space import Knob, Space, Value
from study.front.dominance import Floats

Values = Mapping[str, Value]
"""A point: values by knob."""

REDRAWN = 0.2
"""Share of the moved coordinates that are drawn anew instead of nearby."""


class UnitBox:
    """Points of a space as rows of [0, 1].

    Numbers stand at their place in the range, logarithmic where the knob is; choices at their rank, in the order of
    size if they are numbers. A knob that does not exist under the others is 0.

    Args:
        space: with `size` knobs.
    """

    def __init__(self, space: Space) -> None:
        self.size = len(space)
        self.distributions = {name: _distribution(knob) for name, knob in space.items()}
        self._space = space
        self._choices = {name: _ordered(knob.choices) for name, knob in space.items() if knob.choices is not None}
        self._levels = np.array([_levels(knob) for knob in space.values()])
        names = list(space)
        self._depends = [
            (column, names.index(parent), place)
            for column, knob in enumerate(space.values())
            for parent, place, gone in ((knob.above_zero, 0.0, 0), (knob.below_one, 1.0, 1))
            if parent is not None and self._value(parent, place) == gone
        ]

    def contains(self, point: Values) -> bool:
        """Whether it is a point of the space: some knobs of it, each with a value that it can take."""
        return bool(point) and all(name in self._space and self._space[name].contains(point[name]) for name in point)

    def units(self, points: Sequence[Values]) -> Floats:
        """(n, size) rows of points; of knobs that a point has not, 0."""
        rows = [[self._unit(name, point[name]) if name in point else 0.0 for name in self._space] for point in points]
        return np.array(rows).reshape(-1, self.size)

    def params(self, unit: Floats) -> dict[str, Value]:
        """The point of one row, (size,)."""
        return {name: self._value(name, place) for name, place in zip(self._space, unit.tolist(), strict=True)}

    def snapped(self, rows: Floats) -> Floats:
        """The rows that stand for points of the space, of any rows, (n, size); values have equal parts of [0, 1]."""
        return self._at_levels(np.minimum(np.floor(rows * self._levels), self._levels - 1), rows)

    def near(self, units: Floats, distance: float, rng: Generator) -> Floats:
        """Points near others, (n, size): one to all coordinates are moved, a few of them anywhere.

        Args:
            units: (n, size).
            distance: standard deviation of the moves.
            rng: of the moves.
        """
        moved = np.clip(units + distance * rng.standard_normal(units.shape), 0, 1)
        moved = self._at_levels(np.round(moved * (self._levels - 1)), moved)
        moved = np.where(rng.random(units.shape) < REDRAWN, self.snapped(rng.random(units.shape)), moved)
        chosen = rng.random(units.shape) < 1 / 3
        chosen[np.arange(len(units)), rng.integers(0, self.size, len(units))] = True
        return self._existing(np.where(chosen, moved, units))

    def holding(self, units: Floats, given: Values) -> Floats:
        """The rows, (n, size), with the values that are given."""
        for column, name in enumerate(self._space):
            if name in given:
                units[:, column] = self._unit(name, given[name])
        return self._existing(units)

    def features(self, units: Floats) -> Floats:
        """(n, features) in [0, 1] between which distances mean something: one for each choice that is no number."""
        columns = []
        for place, (name, knob) in zip(units.T, self._space.items(), strict=True):
            if knob.choices is not None and not _numbers(knob.choices):
                last = len(self._choices[name]) - 1
                columns += [np.round(place * last) == rank for rank in range(last + 1)]
            else:
                columns.append(place)
        return np.column_stack(columns).astype(np.float64)

    def _at_levels(self, levels: Floats, rows: Floats) -> Floats:
        """Rows with those of their coordinates that have levels at these."""
        return self._existing(np.where(self._levels > 0, levels / np.maximum(self._levels - 1, 1), rows))

    def _existing(self, units: Floats) -> Floats:
        for column, parent, place in self._depends:
            units[:, column] = np.where(units[:, parent] == place, 0, units[:, column])
        return units

    def _unit(self, name: str, value: Value) -> float:
        knob = self._space[name]
        if knob.choices is not None:
            return self._choices[name].index(value) / max(1, len(knob.choices) - 1)
        low, high = _ends(knob)
        place = math.log(float(value)) if knob.log else float(value)
        return (place - low) / (high - low) if high > low else 0.0

    def _value(self, name: str, unit: float) -> Value:
        knob = self._space[name]
        if knob.choices is not None:
            return self._choices[name][round(unit * (len(knob.choices) - 1))]
        low, high = _ends(knob)
        place = low + unit * (high - low)
        value = min(max(math.exp(place) if knob.log else place, knob.low or 0.0), knob.high or 0.0)
        return round(value) if knob.kind == "int" else value


def _ends(knob: Knob) -> tuple[float, float]:
    low, high = knob.low or 0.0, knob.high or 0.0
    return (math.log(low), math.log(high)) if knob.log else (low, high)


def _levels(knob: Knob) -> int:
    """How many places there are; 0 where they are not counted or not evenly spaced."""
    if knob.choices is not None:
        return len(knob.choices)
    low, high = _ends(knob)
    return int(high - low) + 1 if knob.kind == "int" and not knob.log else 0


def _numbers(choices: Sequence[Value]) -> bool:
    return all(isinstance(choice, int | float) for choice in choices)


def _ordered(choices: Sequence[Value]) -> list[Value]:
    return sorted(choices, key=float) if _numbers(choices) else list(choices)


def _distribution(knob: Knob) -> BaseDistribution:
    if knob.choices is not None:
        return CategoricalDistribution(knob.choices)
    low, high = knob.low or 0.0, knob.high or 0.0
    if knob.kind == "int":
        return IntDistribution(int(low), int(high), log=knob.log)
    return FloatDistribution(low, high, log=knob.log)
