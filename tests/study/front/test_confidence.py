"""`protocol.confidence` is what every interval is taken for, wherever one is used or shown."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import t as student_t

from dashboards.comparison_page import comparison_page
from dashboards.pareto_page import write_front_files
from study.config import Objective, StudyConfig
from study.execution.display import front_table
from study.front.caveats import paired_difference
from study.front.comparison import Comparison, Side
from study.front.estimates import estimates, front, near_front
from study.front.hypervolume import hypervolume_history
from study.paths import short_key
from study.records import Manifest
from trainables.config import Protocol
from trainables.results import Metric

OBJECTIVES = (Objective(metric="clean/mr_r1"), Objective(metric="both/mr_r1"))


def trial(number: int, clean: float, both: float, replicate: int = 0, recipe: str | None = None) -> Manifest:
    values = {"clean/mr_r1": clean, "both/mr_r1": both}
    return Manifest(
        key=f"s-t{number:05d}-s{replicate}",
        number=number + 10 * replicate,
        replicate=replicate,
        recipe=recipe,
        params={"epsilon": number / 255},
        point={"epsilon": number / 255},
        state="complete",
        metrics={name: Metric(value=value, low=value - 0.05, high=value + 0.05) for name, value in values.items()},
        queries={"tr": 100, "ir": 500},
        split="val",
        fingerprint="f",
        ended=number + 10 * replicate,
    )


TRIALS = [
    trial(0, 0.5, 0.3, recipe="mat"),
    trial(1, 0.6, 0.2),
    trial(2, 0.52, 0.22),
    trial(1, 0.62, 0.18, replicate=1),
    trial(3, 0.4, 0.35),
    trial(4, 0.4, 0.25),
]


def test_replicates_and_probabilities_take_the_intervals_for_what_they_are() -> None:
    found = {one.first.number: one for one in estimates(TRIALS, OBJECTIVES, 0.8)}[1].metrics["clean/mr_r1"]
    half = np.hypot(0.05, student_t.ppf(0.9, 1) * 0.02 / 2)  # 0.60 and 0.62
    assert (found.value, found.high - found.value) == pytest.approx((0.61, half))
    wide, narrow = (
        {entry.key: entry.probability for entry in front(TRIALS, OBJECTIVES, confidence)} for confidence in (0.8, 0.999)
    )
    assert all(wide[key] < narrow[key] for key in ("s-t00000-s0", "s-t00001-s0"))
    once = [one for one in TRIALS if not one.replicate]
    assert near_front(once, OBJECTIVES, 0.8) > near_front(once, OBJECTIVES, 0.99999)


def test_what_is_shown_says_the_protocols_confidence(tmp_path: Path) -> None:
    protocol = Protocol(confidence=0.8)
    paths = StudyConfig(name="s", studies_dir=tmp_path).paths
    entries = write_front_files(paths, TRIALS, OBJECTIVES, "A study", protocol)
    assert [entry.probability for entry in entries] == [e.probability for e in front(TRIALS, OBJECTIVES, 0.8)]
    side = Side("s", TRIALS, entries, hypervolume_history(TRIALS, OBJECTIVES))
    console = Console(width=180, record=True, file=(tmp_path / "out").open("w"))
    console.print(front_table(entries, TRIALS, OBJECTIVES, 0.8))
    shown = {
        "page": paths.pareto_page.read_text().partition("</head>")[2],
        "table": console.export_text(),
        "comparison": comparison_page(Comparison(OBJECTIVES, [side, side], entries, {}, 0.8)),
    }
    for name, text in shown.items():
        assert "80 %" in text, name
        assert "95 %" not in text, name


def test_page_file_and_table_show_the_same_means(tmp_path: Path) -> None:
    """Of the replicates of a point, not of its first run."""
    paths = StudyConfig(name="s", studies_dir=tmp_path).paths
    entries = write_front_files(paths, TRIALS, OBJECTIVES, "A study", Protocol())
    console = Console(width=220, record=True, file=(tmp_path / "out").open("w"))
    console.print(front_table(entries, TRIALS, OBJECTIVES))
    page, table = paths.pareto_page.read_text().rpartition("<tbody>")[2], console.export_text()
    for entry in json.loads(paths.front.read_text()):
        (row,) = (line for line in table.splitlines() if f"*{short_key(entry['key'])} " in line)
        (cells,) = (part for part in page.split("<tr>") if f">{short_key(entry['key'])}<" in part)
        for name, value in entry["values"].items():
            low, high = entry["intervals"][name]
            for number in (value, low, high):
                assert f"{number:.3f}".removeprefix("0") in row, name
                assert f"{number:.3f}".removeprefix("0") in cells, name
    (point,) = (entry for entry in entries if entry.replicates == 2)
    assert point.values == pytest.approx({"clean/mr_r1": 0.61, "both/mr_r1": 0.19})


def test_a_difference_on_the_same_images_has_an_interval_of_that_confidence() -> None:
    rng = np.random.default_rng(0)
    bits = [np.packbits(rng.random(500) < share).tobytes() for share in (0.3, 0.5)]
    pair = [
        trial(number, 0.5, 0.3).model_copy(update={"correct": {"both/ir_r1": base64.b64encode(one).decode()}})
        for number, one in enumerate(bits)
    ]
    objectives = (Objective(metric="both/ir_r1"),)
    metrics = {"both/ir_r1": Metric(value=0.5, low=0.4, high=0.6)}
    one, other = estimates([manifest.model_copy(update={"metrics": metrics}) for manifest in pair], objectives, 0.8)
    widths = {
        confidence: found.high - found.low
        for confidence in (0.8, 0.95)
        if (found := paired_difference(one, other, "both/ir_r1", confidence))
    }
    assert widths[0.95] / widths[0.8] == pytest.approx(1.96 / 1.2816, rel=0.1)
