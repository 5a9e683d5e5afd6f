"""Points of a study on plots: the front of two objectives with its line and labels, and knobs against objectives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from dashboards.labels import place_labels
from dashboards.page import INK, error_bars, idle_knobs, lay_out, recipe_name, step_corners, step_line, symbol
from search_spaces.notation import RADII, number, telling, written
from study.config import Objective
from study.front.dominance import front_mask, oriented
from study.front.estimates import Estimate
from trainables.results import Metric

FRONT_LINE = "#3e4c59"
QUIET = "#7b8794"
COLOURS = ("#4477b8", "#7a64b8", "#a8509f", "#cf4a7f", "#e75263")
"""Of the training attack's radius, from none to the strongest. Each has a contrast of 3 or more to the page, and is
lighter than the outline of the front."""


@dataclass(frozen=True)
class Axis:
    """What one axis shows of a point.

    Attributes:
        name: as plain text.
        title: beside the axis, as HTML.
        read: its value, with an interval if it has one.
        rising: whether larger values are better.
        range: what is shown, from the lower to the upper end; None: all of it.
        ticks: values that are marked, with their texts; empty: Plotly's choice.
        log: whether distances are ratios.
    """

    name: str
    title: str
    read: Callable[[Estimate], Metric]
    rising: bool = False
    range: tuple[float, float] | None = None
    ticks: Mapping[float, str] = field(default_factory=dict)
    log: bool = False


@dataclass(frozen=True)
class Points:
    """What all plots of a page are made of.

    Attributes:
        estimates: complete trials, replicates taken together.
        members: keys of the front of all objectives.
        drawn: those of the estimates that have a mark.
    """

    estimates: Sequence[Estimate]
    members: frozenset[str]
    drawn: Sequence[Estimate]

    @property
    def strongest(self) -> float:
        """Radius at the upper end of the colours, in 1/255: the largest on the front and of the recipes."""
        return max((radius(one) for one in self.estimates if self.prominent(one)), default=0.0)

    def prominent(self, estimate: Estimate) -> bool:
        """Whether plots are about this point: on the front, or a recipe."""
        return self.on_front(estimate) or estimate.first.recipe is not None

    def on_front(self, estimate: Estimate) -> bool:
        """Whether the point is on the front of all objectives."""
        return estimate.first.key in self.members


def axis_title(objective: Objective) -> str:
    """An objective's name and its better end, escaped."""
    return f"{escape(objective.metric)} ({'higher' if objective.direction == 'maximize' else 'lower'} is better)"


def objective_axis(objective: Objective, points: Points) -> Axis:
    """The axis of an objective; it shows the front and the recipes with their intervals, and what lies between."""

    def read(estimate: Estimate) -> Metric:
        return estimate.metrics[objective.metric]

    shown = [read(one) for one in points.estimates if points.prominent(one)]
    ends = [end for metric in shown for end in (metric.low, metric.high) if math.isfinite(end)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.05 * max(abs(high), 0.1)
    rising = objective.direction == "maximize"
    return Axis(objective.metric, axis_title(objective), read, rising, (low - room, high + room))


def number_axis(points: Points) -> Axis:
    """The axis of trials in the order they were proposed, where there is one objective only."""
    numbers = [estimate.first.number for estimate in points.estimates]

    def read(estimate: Estimate) -> Metric:
        return Metric(value=estimate.first.number, low=estimate.first.number, high=estimate.first.number)

    return Axis("trial", "trial", read, range=(min(numbers) - 0.5, max(numbers) + 0.5))


def knob_axis(name: str, points: Points) -> Axis:
    """The axis of a knob: numbers in its own unit, in the logarithm where they are far apart; else choices."""
    given = [settings(one) for one in points.estimates]
    values = [one[name] for one in given if one.get(name) is not None and name not in idle_knobs(one)]
    if any(isinstance(value, bool | str) for value in values):
        choices = sorted({written(name, value) for value in values})
        return Axis(name, escape(symbol(name)), lambda one: _exact(choices, name, one), ticks=dict(enumerate(choices)))
    scale = 255.0 if name in RADII else 1.0

    def read(estimate: Estimate) -> Metric:
        given = settings(estimate)
        at = math.nan if name in idle_knobs(given) else scale * float(given.get(name, math.nan))
        return Metric(value=at, low=at, high=at)

    numbers = sorted({scale * value for value in values})
    log = numbers[0] > 0 and numbers[-1] > 4 * numbers[0] and any(isinstance(value, float) for value in values)
    nice = [digit * 10.0**power for power in range(-9, 9) for digit in (1, 2, 5)]
    ticks = [tick for tick in nice if numbers[0] / 1.5 <= tick <= numbers[-1] * 1.5] if log else []
    if len(ticks) > 7:
        ticks = [tick for tick in ticks if math.log10(tick).is_integer()]
    if all(isinstance(value, int) for value in values) and len(numbers) <= 8:
        ticks = numbers
    title = escape(symbol(name)) + ", in 1/255" * (name in RADII)
    return Axis(name, title, read, ticks={tick: f"{tick:g}" for tick in ticks}, log=log)


def _exact(choices: Sequence[str], name: str, estimate: Estimate) -> Metric:
    value = settings(estimate).get(name)
    at = math.nan if value is None else float(choices.index(written(name, value)))
    return Metric(value=at, low=at, high=at)


def pairs_by_conflict(values: Sequence[Sequence[float]], objectives: Sequence[Objective]) -> list[tuple[int, int]]:
    """All pairs of objectives; first the one that conflicts most: most of the front is on the front of these two alone.

    Args:
        values: of the front of all objectives, (n, m).
        objectives: m, two or more.

    Returns:
        Places in `objectives`, otherwise in their order.
    """

    def kept(pair: tuple[int, int]) -> int:
        costs = oriented([[row[place] for place in pair] for row in values], [objectives[place] for place in pair])
        return int(front_mask(costs).sum())

    pairs = list(itertools.combinations(range(len(objectives)), 2))
    first = max(pairs, key=kept)
    return [first, *(pair for pair in pairs if pair != first)]


def pair_figure(points: Points, x: Axis, y: Axis, objectives: Sequence[Objective], height: int) -> Any:
    """One objective against another.

    Args:
        points: what is drawn.
        x: across.
        y: upwards.
        objectives: of the two axes; their own front becomes a line. Fewer than two: no line.
        height: in pixels.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    values = [(x.read(one).value, y.read(one).value) for one in points.estimates]
    own = front_mask(oriented(values, objectives)) if len(objectives) == 2 else np.zeros(len(values), bool)
    front = [values[index] for index in np.flatnonzero(own)]
    if front:
        figure.add_scatter(**step_line(front, x.rising, color=FRONT_LINE, width=2), name="front")
    for trace in _traces(points, x, y):
        figure.add_scatter(**trace)
    lay_out(figure, x.title, y.title, height)
    figure.update_xaxes(range=x.range)
    figure.update_yaxes(range=y.range)
    figure.update_layout(annotations=_labels(points, x, y, front), **_colours(points))
    return figure


def knob_figure(points: Points, knob: Axis, axes: Sequence[Axis]) -> Any:
    """Objectives against a knob, one above the other."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(axes), cols=1, shared_xaxes=True, vertical_spacing=0.04)
    for row, axis in enumerate(axes, 1):
        for trace in _traces(points, knob, axis, small=True):
            figure.add_scatter(**trace, row=row, col=1)
    lay_out(figure, "", "", height=70 + 125 * len(axes))
    figure.update_xaxes(showline=True, linecolor="#d9dfe6")
    if knob.log:
        figure.update_xaxes(type="log")
    if knob.ticks:
        figure.update_xaxes(tickvals=list(knob.ticks), ticktext=list(map(escape, knob.ticks.values())))
    figure.update_xaxes(title=knob.title, row=len(axes), col=1)
    for row, axis in enumerate(axes, 1):
        figure.update_yaxes(title={"text": escape(axis.name), "font": {"size": 11}}, nticks=4, row=row, col=1)
    figure.update_layout(**_colours(points))
    return figure


def _traces(points: Points, x: Axis, y: Axis, small: bool = False) -> list[dict[str, Any]]:
    """Searched points and recipes, each on the front and not: outlined means on the front, a star is a recipe."""
    found = []
    for recipe in (False, True):
        for member in (False, True):
            shown = [
                one
                for one in points.drawn
                if (one.first.recipe is not None) == recipe and points.on_front(one) == member
            ]
            if not shown:
                continue
            xs, ys = [x.read(one) for one in shown], [y.read(one) for one in shown]
            size = (15 if recipe else 11 if member else 9) - 3 * small
            found.append(
                {
                    "x": [metric.value for metric in xs],
                    "y": [metric.value for metric in ys],
                    "error_x": error_bars(xs, strong=member or recipe),
                    "error_y": error_bars(ys, strong=member or recipe),
                    "mode": "markers",
                    "marker": {
                        "size": size,
                        "symbol": "star" if recipe else "circle",
                        "color": [radius(one) for one in shown],
                        "coloraxis": "coloraxis",
                        "line": {"width": 2 if member else 0, "color": INK},
                    },
                    "hovertext": [_hover(one, points.on_front(one)) for one in shown],
                    "hoverinfo": "text",
                    "name": ("published recipe" if recipe else "searched") + (", on the front" if member else ""),
                }
            )
    return found


def _labels(points: Points, x: Axis, y: Axis, front: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """Names of the recipes, tied to their stars by lines, beside the line of the front."""

    def part(value: float, axis: Axis) -> float:
        low, high = axis.range or (0.0, 1.0)
        return (value - low) / (high - low)

    at = [(x.read(one).value, y.read(one).value) for one in points.drawn]
    parts = [(part(across, x), part(up, y)) for across, up in at]
    drawn = [index for index, pair in enumerate(at) if all(map(math.isfinite, pair))]
    recipes = [index for index in drawn if points.drawn[index].first.recipe is not None]
    names = [recipe_name(points.drawn[index].first.recipe) for index in recipes]
    others = [parts[index] for index in drawn if index not in recipes]
    line = [(part(across, x), part(up, y)) for across, up in step_corners(front, x.rising)]
    offsets = place_labels(names, [parts[index] for index in recipes], others, line)
    return [
        {
            "x": at[index][0],
            "y": at[index][1],
            "text": name,
            "ax": across,
            "ay": -up,
            "showarrow": True,
            "arrowhead": 0,
            "arrowwidth": 1,
            "arrowcolor": QUIET,
            "standoff": 8,
            "bgcolor": "rgba(255, 255, 255, 0.8)",
            "borderpad": 1,
            "font": {"size": 12},
        }
        for index, name, (across, up) in zip(recipes, names, offsets, strict=True)
    ]


def _colours(points: Points) -> dict[str, Any]:
    return {"coloraxis": {"colorscale": list(COLOURS), "cmin": 0, "cmax": points.strongest or 1, "showscale": False}}


def radius(estimate: Estimate) -> float:
    """Of a point's training attack, in 1/255."""
    return 255 * float(estimate.first.point.get("epsilon", 0.0))


def settings(estimate: Estimate) -> dict[str, Any]:
    """What was proposed and what it meant; the point has the last word where both name it."""
    return {**estimate.first.params, **estimate.first.point}


def _hover(estimate: Estimate, on_front: bool) -> str:
    """Plotly shows a subset of HTML, so everything from outside is escaped here too."""
    first = estimate.first
    lines = [f"<b>{escape(first.key)}</b>" + (" · on the front" if on_front else "")]
    if first.recipe is not None:
        lines.append(f"recipe: {recipe_name(first.recipe)}")
    if estimate.replicates > 1:
        lines.append(f"mean of {estimate.replicates} runs")
    for name, metric in estimate.metrics.items():
        interval = "" if metric.low == metric.high else f" [{number(metric.low)}, {number(metric.high)}]"
        lines.append(f"{escape(name)}: {number(metric.value)}{interval}")
    for name, value in telling(first.params, first.point).items():
        lines.append(f"{escape(name)}: {escape(written(name, value))}{'/255' * (name in RADII)}")
    return "<br>".join(lines)
