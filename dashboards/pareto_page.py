"""The Pareto page: one HTML file that shows a study's front, works offline and needs no server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

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
from study.config import Objective
from study.front.dominance import measured
from study.front.estimates import FrontEntry, front, write_front
from study.front.hypervolume import hypervolume_history
from study.records import Manifest, StudyPaths, write_if_changed
from trainables.results import Metric

History = Sequence[tuple[float, int, float, float]]

FRONT_LINE = "#d55e00"
HISTORY_LINE = "#0072b2"

LABEL_PLACES = ("top center", "bottom right", "top right", "bottom left")
"""In turn, because the published recipes often lie close together."""


@dataclass(frozen=True)
class Axis:
    """What one axis shows of a trial."""

    name: str
    read: Callable[[Manifest], Metric]
    rising: bool = False
    """Whether larger values are better."""
    hint: str = ""


def pareto_page(
    manifests: Sequence[Manifest],
    entries: Sequence[FrontEntry],
    objectives: Sequence[Objective],
    history: History,
    title: str,
) -> str:
    """The whole page; the same input gives the same bytes.

    Args:
        manifests: the ended trials; those that are complete are drawn.
        entries: the front (`study.front.estimates.front`).
        objectives: 1 to 4; every pair gets a scatter plot, the first two the large one.
        history: `study.front.hypervolume.hypervolume_history`.
        title: the heading.
    """
    complete = [manifest for manifest in manifests if manifest.state == "complete"]
    if complete:
        body = _front_section(complete, entries, objectives) + _history_section(history)
        body += _table_section(complete, entries, objectives)
    else:
        body = "<section><p>No trial has been completed yet. The front appears with the first one.</p></section>"
    return html_page(title, _summary(manifests, entries, history), body)


def write_front_files(
    paths: StudyPaths, manifests: Sequence[Manifest], objectives: Sequence[Objective], title: str
) -> list[FrontEntry]:
    """Bring the study's `front.json` and `pareto.html` up to date and return the front."""
    entries = front(manifests, objectives)
    write_front(paths.front, entries)
    history = hypervolume_history(manifests, objectives)
    write_if_changed(paths.pareto_page, pareto_page(manifests, entries, objectives, history, title))
    return entries


def _summary(manifests: Sequence[Manifest], entries: Sequence[FrontEntry], history: History) -> str:
    states = [manifest.state for manifest in manifests]
    counts = [f"{states.count('complete')} complete", f"{len(entries)} on the front"]
    counts += [f"{states.count(state)} {state}" for state in ("stopped", "infeasible", "failed") if state in states]
    if history:
        counts.append(f"hypervolume {history[-1][3]:.1%} of the box")
        counts.append(f"{duration(history[-1][2])} of device time")
    return "Trials: " + " · ".join(counts)


def _axes(objectives: Sequence[Objective]) -> list[Axis]:
    def axis(objective: Objective) -> Axis:
        better = "higher" if objective.direction == "maximize" else "lower"
        return Axis(
            name=escape(objective.metric),
            read=lambda manifest: measured(manifest, objective.metric),
            rising=objective.direction == "maximize",
            hint=f" ({better} is better)",
        )

    axes = [axis(objective) for objective in objectives]
    if len(axes) == 1:
        number = Axis("trial", lambda trial: Metric(value=trial.number, low=trial.number, high=trial.number))
        axes.insert(0, number)
    return axes


def _front_section(complete: Sequence[Manifest], entries: Sequence[FrontEntry], objectives: Sequence[Objective]) -> str:
    (x, y), *others = itertools.combinations(_axes(objectives), 2)
    members = {entry.key for entry in entries}
    caption = "Bars are the confidence intervals of the evaluation. Colour is the radius of the training attack."
    if len(objectives) > 2:
        caption += " Trials on the front of all objectives together are outlined, in every pair of them."
    labels = f"{len(complete)} trials, {y.name} against {x.name}; the table below lists the front"
    html = "<section>\n<h2>Front</h2>\n<figure>\n"
    html += plot(_scatter(complete, members, x, y, joined=len(objectives) == 2), "front", labels, library=True)
    html += f"<figcaption>{caption}</figcaption>\n</figure>\n"
    if others:
        html += '<div class="pairs">\n'
        for index, (x, y) in enumerate(others):
            figure = _scatter(complete, members, x, y, joined=False, small=True)
            html += "<figure>" + plot(figure, f"pair-{index}", f"{y.name} against {x.name}") + "</figure>\n"
        html += "</div>\n"
    return html + "</section>\n"


def _scatter(
    complete: Sequence[Manifest], members: set[str], x: Axis, y: Axis, *, joined: bool, small: bool = False
) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    if joined:
        points = [(x.read(trial).value, y.read(trial).value) for trial in complete if trial.key in members]
        figure.add_scatter(**step_line(points, x.rising, color=FRONT_LINE, width=2), name="front")
    searched = [trial for trial in complete if trial.recipe is None]
    for name, trials, marker in (
        ("searched", [trial for trial in searched if trial.key not in members], _marker(8, 0.75, "#7b8794")),
        (
            "searched, on the front",
            [trial for trial in searched if trial.key in members],
            _marker(12, 2, INK),
        ),
        (
            "published recipe",
            [trial for trial in complete if trial.recipe is not None],
            _marker(15, 1.5, INK),
        ),
    ):
        if not trials:
            continue
        recipes = trials[0].recipe is not None
        marker |= {"symbol": "star" if recipes else "circle"}
        marker |= {"color": [255 * float(trial.point.get("epsilon", 0.0)) for trial in trials]}
        figure.add_scatter(
            x=[x.read(trial).value for trial in trials],
            y=[y.read(trial).value for trial in trials],
            error_x=error_bars([x.read(trial) for trial in trials]),
            error_y=error_bars([y.read(trial) for trial in trials]),
            mode="markers+text" if recipes and not small else "markers",
            text=[recipe_name(trial.recipe) for trial in trials] if recipes else None,
            textposition=list(itertools.islice(itertools.cycle(LABEL_PLACES), len(trials))),
            hovertext=[_hover(trial, (x, y), trial.key in members) for trial in trials],
            hoverinfo="text",
            marker=marker,
            name=name,
        )
    if small:
        lay_out(figure, x.name, y.name, height=320)
    else:
        lay_out(figure, x.name + x.hint, y.name + y.hint, height=520)
    strongest = max(255 * float(trial.point.get("epsilon", 0.0)) for trial in complete)
    figure.update_layout(
        showlegend=not small,
        coloraxis={
            "colorscale": "Viridis",
            "cmin": 0,
            "cmax": max(strongest, 1),
            "showscale": not small,
            "colorbar": {
                "title": {"text": "training epsilon × 255", "side": "top"},
                "orientation": "h",
                "thickness": 10,
                "len": 0.5,
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "bottom",
            },
        },
    )
    return figure


def _marker(size: float, outline: float, colour: str) -> dict[str, Any]:
    return {"size": size, "coloraxis": "coloraxis", "line": {"width": outline, "color": colour}}


def _hover(trial: Manifest, axes: tuple[Axis, Axis], on_front: bool) -> str:
    """Plotly shows a subset of HTML, so everything from outside is escaped here too."""
    lines = [f"<b>{escape(trial.key)}</b>" + (" · on the front" if on_front else "")]
    if trial.recipe is not None:
        lines.append(f"recipe: {recipe_name(trial.recipe)}")
    for axis in axes:
        metric = axis.read(trial)
        lines.append(f"{axis.name}: {metric.value:.4g} [{metric.low:.4g}, {metric.high:.4g}]")
    lines += [f"{escape(name)}: {setting(name, value)}" for name, value in _settings(trial).items()]
    return "<br>".join(lines)


def _settings(trial: Manifest) -> dict[str, Any]:
    """What was proposed and what it meant; the point has the last word where both name it."""
    return {**trial.params, **trial.point}


def _history_section(history: History) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_scatter(
        x=[count for _, count, _, _ in history],
        y=[share for _, _, _, share in history],
        hovertext=[
            f"{count} trials, {duration(seconds)} of device time<br>hypervolume {share:.2%}"
            for _, count, seconds, share in history
        ],
        hoverinfo="text",
        mode="lines+markers",
        line={"shape": "hv", "color": HISTORY_LINE, "width": 2},
        name="hypervolume",
    )
    lay_out(figure, "trials ended", "hypervolume, share of the box", height=320)
    figure.update_layout(showlegend=False)
    figure.update_yaxes(rangemode="tozero", tickformat=".0%")
    figure.update_xaxes(rangemode="tozero")
    label = f"Hypervolume after each of {len(history)} trials, at the end {history[-1][3]:.1%}" if history else ""
    return (
        "<section>\n<h2>Progress</h2>\n<figure>\n" + plot(figure, "history", label) + "<figcaption>"
        "What the front dominates of the box from the best ends of the objectives to the reference point."
        "</figcaption>\n</figure>\n</section>\n"
    )


def _table_section(complete: Sequence[Manifest], entries: Sequence[FrontEntry], objectives: Sequence[Objective]) -> str:
    trials = {trial.key: trial for trial in complete}
    names = list(dict.fromkeys(name for trial in complete for name in trial.params))
    names = names or list(dict.fromkeys(name for trial in complete for name in trial.point))
    heads = ["trial", "recipe", "probability", *(objective.metric for objective in objectives), *names]
    rows = [_row(entry, trials[entry.key], objectives, names) for entry in entries]
    return table_section("Trials on the front, and the probability of each to be there", "table", heads, rows)


def _row(entry: FrontEntry, trial: Manifest, objectives: Sequence[Objective], names: Sequence[str]) -> str:
    cells = [f'<th scope="row">{escape(entry.key)}</th>', f"<td>{recipe_name(entry.recipe)}</td>"]
    cells.append(f"<td>{entry.probability:.2f}</td>")
    cells += [cell(entry.values[o.metric], *entry.intervals[o.metric]) for o in objectives]
    settings = _settings(trial)
    cells += [f"<td>{setting(name, settings[name]) if name in settings else '–'}</td>" for name in names]
    return "".join(cells)
