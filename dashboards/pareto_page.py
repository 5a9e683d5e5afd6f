"""The Pareto page: one HTML file that shows a study's front, works offline and needs no server."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape

from dashboards.page import (
    INK,
    caveat_section,
    duration,
    html_page,
    interval_cell,
    knob_cells,
    knob_legend,
    lay_out,
    percent_axis,
    plot,
    recipe_name,
    symbol,
    table_section,
)
from dashboards.scatter import (
    COLOURS,
    FRONT_LINE,
    Axis,
    Points,
    knob_axis,
    knob_figure,
    number_axis,
    objective_axis,
    pair_figure,
    pairs_by_conflict,
    settings,
)
from search_spaces.notation import ordered
from study.config import Objective
from study.front.caveats import study_caveats
from study.front.estimates import CONFIDENCE, Estimate, FrontEntry, estimates, excerpt, front, write_front
from study.front.hypervolume import Row, hypervolume_history
from study.front.paired import is_known
from study.paths import StudyPaths, short_key
from study.records import Manifest, write_if_changed
from trainables.config import Protocol
from trainables.errors import counted
from trainables.results import Caveat

History = Sequence[Row]

HISTORY_LINE = "#0072b2"
KEYS = 10
"""Of trials that ended alike, so many are named."""

STEPS = 500
"""Of the progress that are drawn."""

OWN_STYLE = """
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: 0 0 .5rem; padding: 0;
  font-size: .875rem; }
.key svg { height: 1em; width: 1.5em; vertical-align: -.125em; }
.ramp { display: inline-block; width: 5rem; height: .75em; border-radius: 2px; margin: 0 .35em; }
.knobs { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.knobs figure { min-width: 0; }
"""


def pareto_page(
    manifests: Sequence[Manifest],
    entries: Sequence[FrontEntry],
    objectives: Sequence[Objective],
    history: History,
    title: str,
    caveats: Sequence[Caveat] = (),
    confidence: float = CONFIDENCE,
) -> str:
    """The whole page; the same input gives the same bytes.

    Args:
        manifests: the ended trials; those that are complete are drawn, or what stands for them (`excerpt`).
        entries: the front (`study.front.estimates.front`).
        objectives: 1 to 4; every pair gets a plot, the one that conflicts most the large one.
        history: `study.front.hypervolume.hypervolume_history`.
        title: the heading.
        caveats: of the front, `study.front.caveats.study_caveats`; they come first.
        confidence: of the intervals.
    """
    found = estimates(manifests, objectives, confidence)
    if found:
        members = frozenset(entry.key for entry in entries)
        sides = [[one for one in found if (one.first.key in members) == side] for side in (True, False)]
        drawn = {one.first.key for side in sides for one in excerpt(side, objectives)}
        points = Points(found, members, [one for one in found if one.first.key in drawn])
        axes = [objective_axis(objective, points) for objective in objectives]
        body = (
            caveat_section(caveats)
            + _front_section(points, axes, objectives, confidence)
            + _table_section(points, entries, objectives)
        )
        body += _knobs_section(points, axes) + _history_section(history)
    else:
        body = "<section><p>No trial has been completed yet. The front appears with the first one.</p></section>"
    body += _trouble_section(manifests)
    return html_page(title, _summary(manifests, entries, history), body, OWN_STYLE)


def write_front_files(
    paths: StudyPaths,
    manifests: Sequence[Manifest],
    objectives: Sequence[Objective],
    title: str,
    protocol: Protocol,
    history: History | None = None,
) -> list[FrontEntry]:
    """Bring the study's `front.json` and `pareto.html` up to date and return the front.

    Args:
        paths: of the study.
        manifests: the ended trials.
        objectives: of the study.
        title: of the page.
        protocol: they were measured under.
        history: of their hypervolume, where it is known.
    """
    entries = front(manifests, objectives, protocol.confidence)
    write_front(paths.front, entries)
    rows = hypervolume_history(manifests, objectives) if history is None else history
    caveats = study_caveats(manifests, entries, objectives, protocol)
    page = pareto_page(manifests, entries, objectives, rows, title, caveats, protocol.confidence)
    write_if_changed(paths.pareto_page, page)
    return entries


def _summary(manifests: Sequence[Manifest], entries: Sequence[FrontEntry], history: History) -> str:
    states = [manifest.state for manifest in manifests]
    counts = [f"{states.count('complete')} complete", f"{len(entries)} on the front"]
    counts += [f"{states.count(state)} {state}" for state in ("stopped", "infeasible", "failed") if state in states]
    if history:
        counts.append(f"hypervolume {100 * history[-1][3]:.3g} % of the box")
        counts.append(f"{duration(history[-1][2])} of device time")
    images = next((manifest.queries["tr"] for manifest in manifests if "tr" in manifest.queries), None)
    counts += [f"measured on {images} images"] if images else []
    return "Trials: " + " · ".join(counts)


def _front_section(points: Points, axes: Sequence[Axis], objectives: Sequence[Objective], confidence: float) -> str:
    pairs: list[tuple[Axis, Axis, Sequence[Objective]]]
    if len(axes) == 1:
        pairs = [(number_axis(points), axes[0], ())]
        line = ""
    else:
        values = [[axis.read(one).value for axis in axes] for one in points.estimates if points.on_front(one)]
        order = pairs_by_conflict(values, objectives)
        pairs = [(axes[x], axes[y], (objectives[x], objectives[y])) for x, y in order]
        line = "the front" if len(pairs) == 1 else "the front of the two alone"
    figures = []
    for index, (x, y, chosen) in enumerate(pairs):
        figure = pair_figure(points, x, y, chosen, height=360 if index else 480)
        label = escape(
            f"{counted(len(points.drawn), 'trial')}, {y.name} against {x.name}; the table below lists the front"
        )
        name = f"pair-{index}" if index else "front"
        figures.append(f"<figure>{plot(figure, name, label, library=not index)}</figure>\n")
    others = f'<div class="pairs">\n{"".join(figures[1:])}</div>\n' if figures[1:] else ""
    caption = f"Bars are {100 * confidence:g} % confidence intervals over {_sources(points)}."
    if others:
        caption += " The pair of objectives that conflicts most is the large one."
    beyond = sum(any(_beyond(axis, one) for axis in axes) for one in points.estimates)
    if len(points.drawn) < len(points.estimates):
        caption += f" Of {len(points.estimates)} complete trials {len(points.drawn)} are drawn, here and below, spread "
        caption += "over the objectives; lines and edges are those of all."
    if beyond:
        caption += f" {beyond} of the trials lie beyond the edges, far from the front: double-click shows all."
    caption = f'<p class="note">{caption}</p>\n'
    return f"<section>\n<h2>Front</h2>\n{_key(points, line)}{figures[0]}{others}{caption}</section>\n"


def _sources(points: Points) -> str:
    return points.estimates[0].training.sources


def _beyond(axis: Axis, estimate: Estimate) -> bool:
    low, high = axis.range or (-math.inf, math.inf)
    value = axis.read(estimate).value
    return value < low or value > high


def _key(points: Points, line: str) -> str:
    """What the marks of all plots mean. Outlines and shapes tell it without colour."""
    circle = f'<circle cx="12" cy="8" r="5" fill="{COLOURS[-2]}"'
    path = "M12 0l2.3 5.3 5.7.5-4.3 3.8 1.3 5.6L12 12.2 7 15.2l1.3-5.6L4 5.8l5.7-.5z"
    star = f'<path d="{path}" fill="{COLOURS[-2]}"'
    outline = f' stroke="{INK}" stroke-width="2"'
    marks = {
        "searched": f"{circle}/>",
        "searched, on the front": f"{circle}{outline}/>",
        "published recipe": f"{star}/>",
        "recipe, on the front": f"{star}{outline}/>",
    }
    if line:
        marks[line] = f'<path d="M1 12h8V4h14" fill="none" stroke="{FRONT_LINE}" stroke-width="2"/>'
    items = [f'<svg viewBox="-1 -1 26 18" aria-hidden="true">{mark}</svg> {name}' for name, mark in marks.items()]
    if points.strongest:
        ramp = f'<span class="ramp" style="background: linear-gradient(to right, {", ".join(COLOURS)})"></span>'
        items.append(f"ε of the training attack: 0{ramp}{points.strongest:.3g}/255 and more")
    return f'<ul class="key">{"".join(f"<li>{item}</li>" for item in items)}</ul>\n'


def _knobs_section(points: Points, axes: Sequence[Axis]) -> str:
    names = [name for name in _knobs(points) if len({str(settings(one).get(name)) for one in points.estimates}) > 1]
    if not names:
        return ""
    figures = ""
    for index, name in enumerate(names):
        knob = knob_axis(name, points)
        label = escape(
            f"{', '.join(axis.name for axis in axes)} of {counted(len(points.drawn), 'trial')} against {name}"
        )
        figures += f"<figure>{plot(knob_figure(points, knob, axes), f'knob-{index}', label)}</figure>\n"
    return (
        f'<section>\n<h2>Knobs</h2>\n<div class="knobs">\n{figures}</div>\n<p class="note">Every objective against '
        "every knob. The others move, too: what one of them does alone is not to be read from these.</p>\n</section>\n"
    )


def _knobs(points: Points) -> list[str]:
    """The searched ones; those of the points where nothing was searched."""
    found = ordered(name for one in points.estimates for name in one.first.params)
    return found or ordered(name for one in points.estimates for name in one.first.point)


def _history_section(history: History) -> str:
    import plotly.graph_objects as go

    step = max(1, math.ceil(len(history) / STEPS))
    drawn = history[::-step][::-1]  # with the last one
    marked = f" One trial in {step} has a mark." if step > 1 else ""
    figure = go.Figure()
    figure.add_scatter(
        x=[count for _, count, _, _ in drawn],
        y=[100 * share for _, _, _, share in drawn],
        hovertext=[
            f"{counted(count, 'trial')}, {duration(seconds)} of device time<br>hypervolume {100 * share:.3g} %"
            for _, count, seconds, share in drawn
        ],
        hoverinfo="text",
        mode="lines+markers",
        line={"shape": "hv", "color": HISTORY_LINE, "width": 2},
        name="hypervolume",
    )
    lay_out(figure, "trials ended", "hypervolume, % of the box", height=320)
    percent_axis(figure)
    label = f"Hypervolume after each of {len(drawn)} trials, at the end {100 * history[-1][3]:.3g} %" if history else ""
    return (
        f"<section>\n<h2>Progress</h2>\n<figure>\n{plot(figure, 'history', label)}"
        "<figcaption>What the front dominates of the box from the best ends of the objectives to the reference point."
        f"{marked}</figcaption>\n</figure>\n</section>\n"
    )


def _trouble_section(manifests: Sequence[Manifest]) -> str:
    """Which trials have no result that counts, and why; those that ended alike stand together."""
    alike = defaultdict(list)
    for manifest in manifests:
        if manifest.state in ("infeasible", "failed"):
            alike[manifest.state, manifest.reason or ""].append(short_key(manifest.key))
    if not alike:
        return ""
    rows = [
        [
            escape(", ".join(keys[:KEYS]) + (f" and {len(keys) - KEYS} more" if len(keys) > KEYS else "")),
            state,
            escape(reason),
        ]
        for (state, reason), keys in sorted(alike.items())
    ]
    note = "infeasible: the point cannot be used, which the sampler learns; failed: what ran it broke, or a bug"
    return table_section("Without a result", "troubles", ["trials", "state", "reason"], rows, note)


def _table_section(points: Points, entries: Sequence[FrontEntry], objectives: Sequence[Objective]) -> str:
    knobs = _knobs(points)
    heads = ["trial", "recipe", "on the front", *(objective.metric for objective in objectives), *map(symbol, knobs)]
    of = {one.first.key: one for one in points.estimates}
    probabilities = {entry.key: f"{entry.probability:.2f}" for entry in entries}
    others = [key for key, one in of.items() if one.first.recipe and key not in probabilities]
    drawn = {one.first.key for one in points.drawn}
    rows = []
    for key in (key for key in (*probabilities, *others) if key in drawn):
        metrics = [of[key].metrics[objective.metric] for objective in objectives]
        cells = [
            f'<span title="{escape(key)}">{escape(short_key(key))}</span>',
            recipe_name(of[key].first.recipe),
            probabilities.get(key, "no"),
        ]
        rows.append([*cells, *map(interval_cell, metrics), *knob_cells(knobs, settings(of[key]))])
    note = f"on the front: the probability to be there, over {_sources(points)}, the same for all trials; "
    if unpaired := sum(not is_known(of[key].runs, [o.metric for o in objectives]) for key in probabilities):
        note += f"for {unpaired} there is no record of the queries answered, so their errors count as independent; "
    note += knob_legend(knobs)
    if left := len(probabilities.keys() - drawn):
        note = f"{left} more points of the front are in front.json; {note}"
    return table_section("The front, and the recipes beside it", "table", heads, rows, note)
