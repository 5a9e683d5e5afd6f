"""The comparison page: fronts of several studies over each other, what seeds attain, and progress over device-hours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from dashboards.page import (
    INK,
    duration,
    error_bars,
    html_page,
    interval_cell,
    knob_cells,
    knob_legend,
    lay_out,
    percent_axis,
    plot,
    recipe_name,
    step_line,
    symbol,
    table_section,
)
from dashboards.scatter import axis_title, pairs_by_conflict
from search_spaces.notation import in_words, number, ordered
from study.front.dominance import front_mask, oriented, values_at
from study.paths import short_key
from trainables.errors import counted
from trainables.results import Metric

if TYPE_CHECKING:
    from study.config import Objective
    from study.front.comparison import Comparison, Side
    from study.front.estimates import FrontEntry

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
DASHES_OF_STUDIES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "5px 2px")
"""Of the studies in turn; all three, so that no one has to tell them by colour."""

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
    values = [[entry.values[objective.metric] for objective in found.objectives] for entry in found.joint]
    html = ""
    for index, pair in enumerate(pairs_by_conflict(values, found.objectives)):
        x, y = (found.objectives[place] for place in pair)
        figure = go.Figure()
        for place, side in enumerate(found.sides):
            points = [(entry.values[x.metric], entry.values[y.metric]) for entry in side.entries]
            own = np.flatnonzero(front_mask(oriented(points, (x, y))))
            style = {"color": _turn(COLOURS, place), "dash": _turn(DASHES_OF_STUDIES, place), "width": 2}
            line = step_line([points[at] for at in own], x.direction == "maximize", **style)
            figure.add_scatter(**line, showlegend=False, legendgroup=side.name)
            figure.add_scatter(**_markers(side, place, (x, y), joint))
        lay_out(figure, axis_title(x), axis_title(y), height=520 if index == 0 else 400, legend=True)
        label = f"Fronts of {len(found.sides)} studies, {y.metric} against {x.metric}"
        html += f"<figure>{plot(figure, f'fronts-{index}', escape(label), library=index == 0)}</figure>\n"
    caption = f"Bars are {100 * found.confidence:g} % confidence intervals. "
    caption += "Outlined: on the front of all studies together."
    if len(found.objectives) > 2:
        caption += " Lines are the fronts of the two objectives alone."
    return f'<section>\n<h2>Fronts</h2>\n{html}<p class="note">{caption}</p>\n</section>\n'


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
        interval = "" if low == high else f" [{number(low)}, {number(high)}]"
        lines.append(f"{escape(axis)}: {number(entry.values[axis])}{interval}")
    lines += [escape(in_words({name: value})) for name, value in entry.params.items()]
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
    lay_out(figure, axis_title(x), axis_title(y), height=420, legend=True)
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
            y=[100 * share for _, _, _, share in side.history],
            hovertext=[
                f"{counted(count, 'trial')}, {duration(seconds)} of device time<br>hypervolume {100 * share:.3g} %"
                for _, count, seconds, share in side.history
            ],
            hoverinfo="text",
            mode="lines+markers" if len(side.history) == 1 else "lines",
            line={
                "shape": "hv",
                "color": _turn(COLOURS, place),
                "dash": _turn(DASHES_OF_STUDIES, place),
                "width": 2,
            },
            name=escape(side.name),
        )
    lay_out(figure, "device-hours", "hypervolume, % of the box", height=360, legend=True)
    percent_axis(figure)
    return (
        "<section>\n<h2>Progress</h2>\n<figure>"
        + plot(figure, "progress", "Hypervolume of each study over its device-hours", library)
        + "</figure>\n</section>\n"
    )


def _table_section(found: Comparison) -> str:
    of = {manifest.key: (side.name, manifest) for side in found.sides for manifest in side.manifests}
    knobs = ordered(name for entry in found.joint for name in of[entry.key][1].params)
    heads = ["study", "trial", "recipe", *(objective.metric for objective in found.objectives), *map(symbol, knobs)]
    rows = []
    for entry in found.joint:
        study, manifest = of[entry.key]
        trial = f'<span title="{escape(entry.key)}">{escape(short_key(entry.key))}</span>'
        metrics = [interval_cell(_metric(entry, objective.metric)) for objective in found.objectives]
        settings = knob_cells(knobs, {**manifest.params, **manifest.point})
        rows.append([escape(study), trial, recipe_name(entry.recipe), *metrics, *settings])
    return table_section("The front of all studies together", "table", heads, rows, knob_legend(knobs))


def _turn(choices: Sequence[str], place: int) -> str:
    return choices[place % len(choices)]
