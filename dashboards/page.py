"""What all pages have in common: one HTML file each, that works offline and needs no server."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from search_spaces.recipes import RECIPES
from trainables.results import Metric

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
.pairs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
  margin-top: 1rem; }
.pairs figure { min-width: 0; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .4rem .75rem .4rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e4e8ed; white-space: nowrap; }
thead th { border-bottom: 2px solid #9aa5b1; }
tbody th { font-weight: 600; }
.interval { color: #52606d; }
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


def table_section(title: str, name: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table under a heading.

    Args:
        title: of the section, as plain text.
        name: its id on the page.
        heads: of the columns, as plain text.
        rows: cells of each, as HTML.
    """
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return (
        f'<section>\n<h2 id="{name}">{escape(title)}</h2>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n</section>\n"
    )


def cell(value: float, low: float, high: float) -> str:
    """A table's cell with a value and, where it has one, its interval."""
    interval = "" if low == high else f' <span class="interval">[{low:.4g}, {high:.4g}]</span>'
    return f"<td>{value:.4g}{interval}</td>"


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


def error_bars(metrics: Sequence[Metric]) -> dict[str, Any]:
    """Plotly's bars for intervals."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [metric.high - metric.value for metric in metrics],
        "arrayminus": [metric.value - metric.low for metric in metrics],
        "color": "rgba(82, 96, 109, 0.4)",
        "thickness": 1,
        "width": 0,
    }


def recipe_name(recipe: str | None) -> str:
    """As the papers write it, escaped; others appear as they are."""
    titles: dict[str | None, str] = {name: published.title for name, published in RECIPES.items()}
    return escape(titles.get(recipe, recipe or ""))


def setting(name: str, value: Any) -> str:
    """A knob's value, escaped; radii in parts of 255."""
    if name == "epsilon" and isinstance(value, int | float):
        return f"{255 * value:.3g}/255"
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def duration(seconds: float) -> str:
    """In hours or minutes."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def lay_out(figure: Any, x_label: str, y_label: str, height: int) -> None:
    """A figure as all look."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 64, "r": 16, "t": 16, "b": 56},
        font={"color": INK, "size": 13, "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"},
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(title=x_label, automargin=True, zeroline=False)
    figure.update_yaxes(title=y_label, automargin=True, zeroline=False)


def plot(figure: Any, name: str, label: str, library: bool = False) -> str:
    """The figure as HTML; `library` puts Plotly itself in front of it, once a page."""
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=library,
        div_id=name,
        config={"responsive": True, "displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]},
    )
    return f'<div role="group" aria-label="{label}">{html}</div>\n'
