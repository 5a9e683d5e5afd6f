"""What all pages have in common: one HTML file each, that works offline and needs no server."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from search_spaces.notation import SYMBOLS, number, written
from search_spaces.recipes import title as title_of
from trainables.results import Caveat, Metric

INK = "#1f2933"

# auto-fill, not auto-fit: each plot measures its column while the later ones are not there yet.
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.25rem 1rem 3rem; background: #f7f8fa; color: #1f2933;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
p { margin: 0 0 .75rem; }
.summary { color: #52606d; margin-bottom: 1.25rem; }
section { background: #fff; border: 1px solid #d9dfe6; border-radius: 8px; padding: 1rem;
  margin-bottom: 1rem; }
figure { margin: 0; }
figcaption { color: #52606d; font-size: .875rem; margin-top: .5rem; }
.pairs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
  margin-top: 1rem; }
.pairs figure { min-width: 0; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
.note { color: #52606d; font-size: .875rem; margin: .5rem 0 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .4rem .5rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e8ed; }
td { white-space: nowrap; }
thead th { border-bottom: 2px solid #9aa5b1; vertical-align: bottom; }
tbody th { font-weight: 600; }
.interval { color: #52606d; display: block; font-size: .8125rem; }
@media (max-width: 64rem) {
  section { padding: .75rem; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody { display: block; }
  tr { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: .6rem 0; border-bottom: 1px solid #d9dfe6; }
  tbody th { flex: 1 0 100%; }
  th, td { border: 0; padding: 0; white-space: normal; }
  td:empty { display: none; }
  td:has(.interval) { flex-basis: 100%; }
  td::before { content: attr(data-head) " "; color: #52606d; }
  .interval { display: inline; }
}
.caveats { border-left: 4px solid #d55e00; }
.caveats ul { margin: 0; padding-left: 1.25rem; overflow-wrap: anywhere; }
"""


def html_page(title: str, summary: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: the heading, as plain text.
        summary: a line below it, as HTML.
        body: sections, as HTML.
        style: CSS beyond that of all pages.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="summary">{summary}</p>\n'
        f"{body}</main>\n</body>\n</html>\n"
    )


def caveat_section(caveats: Sequence[Caveat]) -> str:
    """What has to be known before the numbers are relied on; nothing where that is nothing."""
    if not caveats:
        return ""
    items = "".join(f"<li>{escape(caveat.text)}</li>\n" for caveat in caveats)
    return f'<section class="caveats">\n<h2>Before you rely on this</h2>\n<ul>\n{items}</ul>\n</section>\n'


def table_section(title: str, name: str, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A table under a heading; where the screen is narrow each row becomes a card, with the heads before its values.

    Args:
        title: of the section, as plain text.
        name: its id on the page.
        heads: of the columns, as plain text.
        rows: cells of each, as HTML; the first is the row's own head.
        note: below the table, as plain text.
    """
    # The roles are those that the elements have. Browsers forget them where a table is laid out otherwise.
    broken = [escape(text).replace("/", "/<wbr>") for text in heads]
    head = "".join(f'<th scope="col" role="columnheader">{text}</th>' for text in broken)
    body = ""
    for first, *others in rows:
        body += f'<tr role="row"><th scope="row" role="rowheader">{first}</th>'
        for text, content in zip(heads[1:], others, strict=True):
            body += f'<td role="cell" data-head="{escape(text)}">{content}</td>'
        body += "</tr>\n"
    below = f'<p class="note">{escape(note)}</p>\n' if note else ""
    return (
        f'<section>\n<h2 id="{name}">{escape(title)}</h2>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">\n'
        f'<table role="table">\n<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{body}</tbody>\n</table>\n</div>\n{below}</section>\n'
    )


def interval_cell(metric: Metric | None) -> str:
    """A table's cell with a value and, where it has one, its interval; nothing where nothing was measured."""
    if metric is None or math.isnan(metric.value):
        return ""
    if metric.low == metric.high:
        return number(metric.value)
    return f'{number(metric.value)} <span class="interval">[{number(metric.low)}, {number(metric.high)}]</span>'


def symbol(knob: str) -> str:
    """As papers write a knob; others as they are."""
    return SYMBOLS[knob].letter if knob in SYMBOLS else knob


def idle_knobs(settings: Mapping[str, Any]) -> set[str]:
    """Knobs that say nothing at a point: steps without a radius."""
    return {"attack_steps"} if not settings.get("epsilon", True) else set()


def knob_cells(knobs: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Cells with a point's values, escaped; a dash where it has none, as of steps without a radius."""
    idle = idle_knobs(settings)
    shown = {name: escape(written(name, settings[name])) for name in knobs if name in settings and name not in idle}
    return [shown.get(name, "–") for name in knobs]


def knob_legend(knobs: Sequence[str]) -> str:
    """What the symbols mean."""
    return "; ".join(f"{SYMBOLS[name].letter}: {SYMBOLS[name].meaning}" for name in knobs if name in SYMBOLS)


def step_line(points: Sequence[tuple[float, float]], rising: bool, **settings: Any) -> dict[str, Any]:
    """A front as a Plotly trace: the line between what its points attain and what they do not.

    Args:
        points: (x, y) of each.
        rising: whether larger x are better.
        settings: of the line.
    """
    steps = sorted(points)
    # Between two neighbours the worse x already has the better y: the step follows what is attained.
    line = {"shape": "vh" if rising else "hv", **settings}
    return {"x": [x for x, _ in steps], "y": [y for _, y in steps], "mode": "lines", "line": line, "hoverinfo": "skip"}


def step_corners(points: Sequence[tuple[float, float]], rising: bool) -> list[tuple[float, float]]:
    """Where the line of `step_line` begins, turns and ends."""
    steps = sorted(points)
    turns = [[start, (start[0], end[1]) if rising else (end[0], start[1])] for start, end in itertools.pairwise(steps)]
    return [corner for pair in turns for corner in pair] + steps[-1:]


def error_bars(metrics: Sequence[Metric], strong: bool = True) -> dict[str, Any]:
    """Plotly's bars for intervals; the others are faint where there are many."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [metric.high - metric.value for metric in metrics],
        "arrayminus": [metric.value - metric.low for metric in metrics],
        "color": "rgba(82, 96, 109, 0.45)" if strong else "rgba(82, 96, 109, 0.18)",
        "thickness": 1,
        "width": 0,
    }


def recipe_name(recipe: str | None) -> str:
    """As the papers write it, escaped; others appear as they are."""
    return escape(title_of(recipe))


def duration(seconds: float) -> str:
    """In hours or minutes."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def lay_out(figure: Any, x_label: str, y_label: str, height: int, legend: bool = False) -> None:
    """A figure as all look.

    Args:
        figure: of Plotly.
        x_label: as HTML.
        y_label: as HTML.
        height: in pixels.
        legend: whether names of traces stand below.
    """
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 64, "r": 16, "t": 16, "b": 56},
        font={"color": INK, "size": 13, "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"},
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(title=x_label, automargin=True, zeroline=False)
    figure.update_yaxes(title=y_label, automargin=True, zeroline=False)


def percent_axis(figure: Any) -> None:
    """An upright axis in percent from zero. Plotly takes as many digits as tell its ticks apart, at any zoom."""
    figure.update_yaxes(rangemode="tozero", exponentformat="none", nticks=6)
    figure.update_xaxes(rangemode="tozero")


def plot(figure: Any, name: str, label: str, library: bool = False) -> str:
    """The figure as HTML; `library` puts Plotly itself in front of it, once a page."""
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=library,
        div_id=name,
        config={"responsive": True, "displayModeBar": False},
    )
    return f'<div role="group" aria-label="{label}">{html}</div>\n'
