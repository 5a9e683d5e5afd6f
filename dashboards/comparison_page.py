"""The comparison page: fronts of several studies over each other, what seeds attain, and progress over device-hours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from dashboards.page import (
    INK,
    cell,
    duration,
    error_bars,
    html_page,
    lay_out,
    plot,
    recipe_name,
    setting,
    step_line,
    table_section,
)
from study.front.dominance import values_at
from trainables.results import Metric

if TYPE_CHECKING:
    from study.config import Objective
    from study.front.comparison import Comparison, Side
    from study.front.estimates import FrontEntry

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
"""Of the studies in turn; both, so that no one has to tell them by colour."""

DASHES = {"best": "dot", "median": "solid", "worst": "dash"}


def comparison_page(found: Comparison) -> str:
    """The whole page; the same input gives the same bytes, and names are escaped."""
    body = _fronts_section(found) if len(found.objectives) > 1 else ""
    body += "".join(_surfaces_section(index, names, found) for index, names in enumerate(found.surfaces))
    body += _progress_section(found.sides, library=not body) + _table_section(found)
    counts = [
        f"{side.name}: {len(side.entries)} on its front, {found.on_joint(side)} on the joint" for side in found.sides
    ]
    return html_page(" and ".join(side.name for side in found.sides), escape(" · ".join(counts)), body)


def _fronts_section(found: Comparison) -> str:
    import plotly.graph_objects as go

    joint = {entry.key for entry in found.joint}
    html = ""
    for index, (x, y) in enumerate(itertools.combinations(found.objectives, 2)):
        figure = go.Figure()
        for place, side in enumerate(found.sides):
            if len(found.objectives) == 2:
                points = [(entry.values[x.metric], entry.values[y.metric]) for entry in side.entries]
                line = step_line(points, x.direction == "maximize", color=_turn(COLOURS, place), width=2)
                figure.add_scatter(**line, showlegend=False, legendgroup=side.name)
            figure.add_scatter(**_markers(side, place, (x, y), joint))
        lay_out(figure, escape(x.metric), escape(y.metric), height=520 if index == 0 else 400)
        label = f"Fronts of {len(found.sides)} studies, {y.metric} against {x.metric}"
        html += f"<figure>{plot(figure, f'fronts-{index}', escape(label), library=index == 0)}</figure>\n"
    caption = "Bars are the confidence intervals of the evaluation. Outlined: on the front of all studies together."
    return f"<section>\n<h2>Fronts</h2>\n{html}<p>{caption}</p>\n</section>\n"


def _markers(side: Side, place: int, axes: tuple[Objective, Objective], joint: set[str]) -> dict[str, Any]:
    x, y = ([_metric(entry, axis.metric) for entry in side.entries] for axis in axes)
    return {
        "x": [metric.value for metric in x],
        "y": [metric.value for metric in y],
        "error_x": error_bars(x),
        "error_y": error_bars(y),
        "mode": "markers",
        "marker": {
            "size": 11,
            "color": _turn(COLOURS, place),
            "symbol": _turn(SYMBOLS, place),
            "line": {"color": INK, "width": [2 if entry.key in joint else 0 for entry in side.entries]},
        },
        "hovertext": [_hover(entry, axes, entry.key in joint) for entry in side.entries],
        "hoverinfo": "text",
        "name": escape(side.name),
        "legendgroup": side.name,
    }


def _metric(entry: FrontEntry, name: str) -> Metric:
    low, high = entry.intervals[name]
    return Metric(value=entry.values[name], low=low, high=high)


def _hover(entry: FrontEntry, axes: tuple[Objective, Objective], on_joint: bool) -> str:
    """Plotly shows a subset of HTML, so everything from outside is escaped here too."""
    lines = [f"<b>{escape(entry.key)}</b>" + (" · on the joint front" if on_joint else "")]
    lines += [f"recipe: {recipe_name(entry.recipe)}"] if entry.recipe else []
    for axis in (axis.metric for axis in axes):
        low, high = entry.intervals[axis]
        lines.append(f"{escape(axis)}: {entry.values[axis]:.4g} [{low:.4g}, {high:.4g}]")
    lines += [f"{escape(name)}: {setting(name, value)}" for name, value in entry.params.items()]
    return "<br>".join(lines)


def _surfaces_section(index: int, names: str, found: Comparison) -> str:
    import plotly.graph_objects as go

    x, y = found.objectives
    figure = go.Figure()
    for level, costs in found.surfaces[names].items():
        points = values_at(costs[np.isfinite(costs).all(axis=1)], found.objectives).tolist()
        line = step_line([(first, second) for first, second in points], x.direction == "maximize", dash=DASHES[level])
        line["line"] |= {"color": _turn(COLOURS, index), "width": 2}
        figure.add_scatter(**line, name=level)
    lay_out(figure, escape(x.metric), escape(y.metric), height=420)
    label = f"Attainment surfaces of {names}"
    caption = (
        "A line and all that it dominates is attained by one seed (best), by half of them (median), by all (worst)."
    )
    return (
        f"<section>\n<h2>What seeds attain: {escape(names)}</h2>\n<figure>"
        f"{plot(figure, f'surfaces-{index}', escape(label))}<figcaption>{caption}</figcaption></figure>\n</section>\n"
    )


def _progress_section(sides: Sequence[Side], library: bool) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for place, side in enumerate(sides):
        figure.add_scatter(
            x=[seconds / 3600 for _, _, seconds, _ in side.history],
            y=[share for _, _, _, share in side.history],
            hovertext=[
                f"{count} trials, {duration(seconds)} of device time<br>hypervolume {share:.2%}"
                for _, count, seconds, share in side.history
            ],
            hoverinfo="text",
            mode="lines",
            line={"shape": "hv", "color": _turn(COLOURS, place), "width": 2},
            name=escape(side.name),
        )
    lay_out(figure, "device-hours", "hypervolume, share of the box", height=360)
    figure.update_yaxes(rangemode="tozero", tickformat=".0%")
    figure.update_xaxes(rangemode="tozero")
    return (
        "<section>\n<h2>Progress</h2>\n<figure>"
        + plot(figure, "progress", "Hypervolume of each study over its device-hours", library)
        + "</figure>\n</section>\n"
    )


def _table_section(found: Comparison) -> str:
    of = {entry.key: side.name for side in found.sides for entry in side.entries}
    heads = ["study", "trial", "recipe", *(objective.metric for objective in found.objectives)]
    rows = []
    for entry in found.joint:
        cells = [f'<th scope="row">{escape(of[entry.key])}</th>', f"<td>{escape(entry.key)}</td>"]
        cells.append(f"<td>{recipe_name(entry.recipe)}</td>")
        cells += [cell(entry.values[o.metric], *entry.intervals[o.metric]) for o in found.objectives]
        rows.append("".join(cells))
    return table_section("The front of all studies together", "table", heads, rows)


def _turn(choices: Sequence[str], place: int) -> str:
    return choices[place % len(choices)]
