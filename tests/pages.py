"""What a page shows, read back from its HTML or from a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# A browser cannot be a Python dependency; the page's content is tested without one, too.
needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")

# Of a page as it is drawn: whether it is wider than its window, which of its tables are wider than their sections, how
# many labels there are, and which of them touch the middle of a marker or another label.
MEASURE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const box = (element) => element.getBoundingClientRect();
  const middle = (r) => [(r.left + r.right) / 2, (r.top + r.bottom) / 2];
  const covers = (r, [x, y]) => r.left < x && x < r.right && r.top < y && y < r.bottom;
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const touching = [], labels = [];
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const texts = [...plot.querySelectorAll(".annotation .annotation-text")];
    const stars = [...plot.querySelectorAll(".points path.point")].filter((p) => p.getAttribute("d").length > 60);
    for (const text of texts) {
      labels.push(text.textContent);
      if (stars.some((star) => covers(box(text), middle(box(star))))) touching.push(plot.id + " " + text.textContent);
      if (texts.some((other) => other !== text && meet(box(text), box(other)))) touching.push("labels");
    }
  }
  const wide = [...document.querySelectorAll(".scroll")].filter((s) => s.scrollWidth > s.clientWidth).length;
  const page = document.documentElement;
  parent.postMessage({width: innerWidth, overflow: page.scrollWidth - innerWidth, wide, labels, touching}, "*");
}, 500));
</script>
"""

FRAME = """<!doctype html><body><iframe src="page.html" style="border: 0; width: {width}px; height: 4000px"></iframe>
<script>addEventListener("message", (event) => {{ document.title = JSON.stringify(event.data); }});</script>"""


def data_of(page: str, name: str) -> list[dict[str, Any]]:
    """The traces of the embedded figure `name`."""
    start = re.search(rf'Plotly\.newPlot\(\s*"{name}",\s*', page)
    assert start is not None, f"no figure {name}"
    data: list[dict[str, Any]] = json.JSONDecoder().raw_decode(page, start.end())[0]
    return data


def traces_of(page: str, name: str) -> dict[str, dict[str, Any]]:
    """The traces of a figure by their names; those without a name are left out."""
    return {trace["name"]: trace for trace in data_of(page, name) if "name" in trace}


def layout_of(page: str, name: str) -> dict[str, Any]:
    """The layout of the embedded figure `name`."""
    start = re.search(rf'Plotly\.newPlot\(\s*"{name}",\s*', page)
    assert start is not None, f"no figure {name}"
    _, end = json.JSONDecoder().raw_decode(page, start.end())
    layout: dict[str, Any] = json.JSONDecoder().raw_decode(page, page.index("{", end))[0]
    return layout


def dom_of(path: Path) -> str:
    """The document of a page after Chromium has drawn it."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --window-size=1400,900 "
    flags += "--disable-background-networking --disable-component-update --virtual-time-budget=8000 --dump-dom"
    command = ["chromium", *flags.split(), f"--user-data-dir={path.parent / 'profile'}", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measured(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What `MEASURE` finds on a page in a window of this width, in CSS pixels."""
    (folder / "page.html").write_text(page.replace("</body>", f"{MEASURE}</body>"))
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width))
    title = re.search(r"<title>(.*?)</title>", dom_of(frame))
    assert title is not None, "the page was not drawn"
    found: dict[str, Any] = json.loads(html.unescape(title.group(1)))
    return found
