"""`python -m benchmarks.pictures`: the README's pictures of a study that was run: its page and its table.

Chromium draws the page; without it there is only the table.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console

from dashboards.pareto_page import pareto_page
from study.execution.display import front_table
from study.front.estimates import front
from study.front.hypervolume import hypervolume_history
from study.paths import StudyPaths
from study.records import write_if_changed
from study.view import StudyView, read_study, study_parser
from trainables.cli.command import exit_on_input_error
from trainables.errors import InputError

PICTURES = Path(__file__).resolve().parents[1] / "dashboards" / "pictures"

COLUMNS = 128
"""Of the terminal: as many as one table takes."""

WINDOW = (1120, 1140)
"""Of the browser, in CSS pixels: as far as the front with all its pairs."""


def table_picture(view: StudyView) -> str:
    """The final table as SVG, without the web font that Rich would load from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False, force_terminal=True)
    objectives = view.config.objectives
    console.print(front_table(front(view.manifests, objectives), view.manifests, objectives))
    title = f"python -m study.status --name {view.config.name}"
    svg = console.export_svg(title=title, unique_id="table")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def page_picture(view: StudyView, chromium: str) -> Image.Image:
    """The upper part of the page, as Chromium draws it."""
    objectives = view.config.objectives
    entries, history = front(view.manifests, objectives), hypervolume_history(view.manifests, objectives)
    title = f"Pareto front of {view.config.name}"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(pareto_page(view.manifests, entries, objectives, history, title), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
        flags += [f"--user-data-dir={folder}/profile", f"--window-size={WINDOW[0]},{WINDOW[1]}"]
        command = [chromium, *flags, f"--screenshot={folder}/page.png", page.as_uri()]
        subprocess.run(command, capture_output=True, timeout=120, check=True)
        with Image.open(f"{folder}/page.png") as picture:
            return picture.convert("RGB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = study_parser("python -m benchmarks.pictures", __doc__)
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    with exit_on_input_error():
        view = read_study(StudyPaths(options.studies_dir / options.name))
        if not any(manifest.state == "complete" for manifest in view.manifests):
            raise InputError(f"study {options.name!r} has no complete trial yet; run it first")
        options.out.mkdir(parents=True, exist_ok=True)
        write_if_changed(options.out / "table.svg", table_picture(view))
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        if chromium is None:
            raise InputError("the page is drawn by Chromium, which is not installed; only the table's picture was made")
        page_picture(view, chromium).save(options.out / "page.png", optimize=True)
    print(f"pictures: {options.out / 'page.png'}  {options.out / 'table.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
