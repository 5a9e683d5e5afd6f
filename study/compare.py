"""`python -m study.compare NAME NAME ...`: studies side by side, such as model families, samplers or seeds.

It prints how they compare and writes a page: their fronts, the front of all of them together, their hypervolume over
device-hours, and, of studies that differ in nothing but the seed, what a share of the seeds attains.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from study.config import Objective
from study.front.comparison import Comparison, Side
from study.front.dominance import measured, oriented
from study.front.estimates import front
from study.front.hypervolume import attainment, hypervolume_history, hypervolume_share
from study.paths import StudyPaths
from study.records import read_frozen, write_if_changed
from study.view import StudyView, read_study
from trainables.cli.command import argument, command_parser, exit_on_input_error, place, place_or_url
from trainables.config import BATCH_IMAGES
from trainables.config.fields import check_name
from trainables.errors import InputError
from trainables.identity import differences

LEVELS = {"best": 0.0, "median": 0.5, "worst": 1.0}
"""Shares of the seeds that attain a surface; the best is what one of them does."""

PICTURES = ("image_pixels", "resize")
"""Of the data: what model families need differently. The digest of the data depends on them, too."""


def compare(views: Sequence[StudyView], metrics: Sequence[str]) -> Comparison:
    """Put studies beside each other.

    Args:
        views: two or more.
        metrics: to compare by; empty: the objectives of the first.

    Raises:
        InputError: they cannot be compared, or have not all measured the metrics.
    """
    marks = {view.config.name: read_frozen(view.paths).fingerprint for view in views}
    _demand_one_protocol(marks)
    objectives, confidence = _objectives(views, metrics), views[0].config.protocol.confidence
    sides = [
        Side(
            view.config.name,
            view.manifests,
            front(view.manifests, objectives, confidence),
            hypervolume_history(view.manifests, objectives),
        )
        for view in views
    ]
    joint = front([manifest for side in sides for manifest in side.manifests], objectives, confidence)
    surfaces = {}
    for group in _alike(marks):
        if len(objectives) != 2:
            continue
        fronts = [
            oriented([[entry.values[o.metric] for o in objectives] for entry in side.entries], objectives)
            for side in sides
            if side.name in group
        ]
        surfaces[", ".join(group)] = {
            level: attainment(fronts, max(share, 1 / len(fronts))) for level, share in LEVELS.items()
        }
    return Comparison(objectives, sides, joint, surfaces, confidence)


def _demand_one_protocol(marks: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse what was not attacked alike, or on other images. Re-ranking adds metrics and changes none."""
    (first, mark), *others = marks.items()
    lines = []
    for name, other in others:
        before, after = map(_measured, (mark, other))
        found = differences(before, after, "protocol")
        splits = [m.get("data", {}).get("eval_split") for m in (mark, other)]
        found += differences(splits[0], splits[1], "data.eval_split")
        shapes = [[m.get("data", {}).get(field) for field in PICTURES] for m in (mark, other)]
        if shapes[0] == shapes[1]:
            found += differences(mark.get("data_digest"), other.get("data_digest"), "data_digest")
        lines += [f"  {first} and {name}: {line}" for line in found]
    if lines:
        raise InputError(
            "these studies did not measure the same, so they cannot be compared:\n"
            + "\n".join(lines)
            + "\ncompare studies of one protocol on the same data"
        )


def _measured(mark: Mapping[str, Any]) -> dict[str, Any]:
    protocol = mark.get("protocol", {})
    return {**protocol, "rerank": None, "batch_images": protocol.get("batch_images") or BATCH_IMAGES}


def _objectives(views: Sequence[StudyView], metrics: Sequence[str]) -> tuple[Objective, ...]:
    known = {o.metric: o for view in reversed(views) for o in view.config.objectives}
    metrics = metrics or [objective.metric for objective in views[0].config.objectives]
    complete = {view.config.name: [m for m in view.manifests if m.state == "complete"] for view in views}
    missing = [
        f"  {name}: {metric}"
        for name, manifests in complete.items()
        for metric in metrics
        if not any(np.isfinite(measured(manifest, metric).value) for manifest in manifests)
    ]
    if missing:
        shared = set.intersection(*({name for m in manifests for name in m.metrics} for manifests in complete.values()))
        raise InputError(
            "not every study has measured what to compare by:\n"
            + "\n".join(missing)
            + f"\ngive --metrics of these: {', '.join(sorted(shared)) or 'none is in all of them'}"
        )
    unknown = [metric for metric in metrics if metric.startswith("cost/") and metric not in known]
    if unknown:
        raise InputError(f"--metrics: {', '.join(unknown)}: a cost has a range only as an objective of a study")
    return tuple(known.get(metric) or Objective(metric=metric) for metric in metrics)


def _alike(marks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Names of studies that differ in the seed only, together; those that are alone are left out."""
    groups: list[list[str]] = []
    for name, mark in marks.items():
        for group in groups:
            if not differences({**marks[group[0]], "seed": None}, {**mark, "seed": None}):
                group.append(name)
                break
        else:
            groups.append([name])
    return [group for group in groups if len(group) > 1]


def _print(found: Comparison) -> None:
    from rich.table import Table
    from rich.text import Text

    from study.execution.display import terminal

    console = terminal()
    table = Table(box=None, pad_edge=False)
    for name in ("study", "complete", "on its front", "on the joint front", "hypervolume", "device-hours"):
        table.add_column(name, justify="left" if name == "study" else "right")
    for side in found.sides:
        _, _, seconds, share = side.history[-1]
        complete = sum(manifest.state == "complete" for manifest in side.manifests)
        counts = (str(count) for count in (complete, len(side.entries), found.on_joint(side)))
        table.add_row(Text(side.name), *counts, f"{share:.3g}", f"{seconds / 3600:.2f}")
    console.print(table)
    for names, surfaces in found.surfaces.items():
        attained = ", ".join(f"{level} {hypervolume_share(costs):.3g}" for level, costs in surfaces.items())
        console.print(Text(f"seeds of one study ({names}): hypervolume attained: {attained}"))


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    examples = (
        "python -m study.compare clip albef",
        "python -m study.compare clip albef --metrics clean/mr_r1 both/mr_r1",
    )
    parser = command_parser("python -m study.compare", __doc__, *examples)
    parser.add_argument("names", nargs="+", type=argument(check_name), metavar="NAME", help="two studies or more")
    parser.add_argument(
        "--studies-dir",
        type=place_or_url,
        metavar="PATH",
        default=Path("studies"),
        help="root of all studies: a path, or s3:// or gs:// with a bucket (default: %(default)s)",
    )
    parser.add_argument(
        "--metrics", nargs="+", metavar="METRIC", default=(), help="1 to 4 (default: the objectives of the first study)"
    )
    parser.add_argument(
        "--page", type=place, metavar="PATH", help="its file (default: comparison.html in the folder of the studies)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    from dashboards.comparison_page import comparison_page

    options = parser().parse_args(arguments)
    with exit_on_input_error():
        names = list(dict.fromkeys(options.names))
        if len(names) < 2:
            raise InputError(f"NAME: {names[0]} is one study; a comparison takes two or more")
        if len(options.metrics) > 4:
            raise InputError(f"--metrics: {len(options.metrics)} are given; 1 to 4 can be compared by")
        found = compare([read_study(StudyPaths(options.studies_dir / name)) for name in names], options.metrics)
        _print(found)
        path = options.page or options.studies_dir / "comparison.html"
        write_if_changed(path, comparison_page(found))
        print(f"page: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
