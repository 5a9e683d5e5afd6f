from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dashboards.pareto_page import pareto_page, write_front_files
from study.config import Objective
from study.front.estimates import front
from study.front.hypervolume import hypervolume_history
from study.records import Manifest, StudyPaths
from tests.pages import traces_of

OBJECTIVES = (
    Objective(metric="both/mr_r5"),
    Objective(metric="clean/mr_r5"),
    Objective(metric="cost/device_seconds", direction="minimize", low=0, high=100),
    Objective(metric="image/mr_r5"),
)
ATTACK = "<script>alert(1)</script><img src=x onerror=\"document.title='owned'\">"


def manifest(number: int, robust: float, clean: float, **changes: Any) -> Manifest:
    fields = {
        "key": f"s-t{number:05d}-s0",
        "number": number,
        "recipe": None,
        "params": {"temperature": 0.05},
        "point": {"temperature": 0.05, "epsilon": number / 255},
        "state": "complete",
        "metrics": {
            "both/mr_r5": {"value": robust, "low": robust - 0.1, "high": robust + 0.2},
            "clean/mr_r5": {"value": clean, "low": clean - 0.1, "high": clean + 0.1},
            "image/mr_r5": {"value": 0.5, "low": 0.4, "high": 0.6},
        },
        "cost": {"device_seconds": 10.0 + number},
        "fingerprint": "f",
        "ended": float(number),
    }
    return Manifest.model_validate(fields | changes)


def page_of(
    manifests: list[Manifest], objectives: tuple[Objective, ...] = OBJECTIVES[:2], title: str = "A study"
) -> str:
    history = hypervolume_history(manifests, objectives)
    return pareto_page(manifests, front(manifests, objectives), objectives, history, title)


def manifests() -> list[Manifest]:
    return [
        manifest(0, 0.25, 0.75, recipe="tecoa_itr"),
        manifest(1, 0.5, 0.5),
        manifest(2, 0.25, 0.5),
        manifest(3, 0.75, 0.25),
        manifest(4, 0.9, 0.9, state="infeasible"),
    ]


def test_every_complete_trial_is_drawn_once_with_interval_and_colour() -> None:
    traces = traces_of(page_of(manifests()), "front")
    assert traces["searched"]["x"] == [0.25]
    assert traces["searched"]["y"] == [0.5]
    assert traces["searched, on the front"]["x"] == [0.5, 0.75]
    assert traces["searched, on the front"]["error_x"]["array"] == pytest.approx([0.2, 0.2])
    assert traces["searched, on the front"]["error_x"]["arrayminus"] == pytest.approx([0.1, 0.1])
    assert traces["searched, on the front"]["marker"]["color"] == pytest.approx([1, 3])
    assert traces["published recipe"]["text"] == ["TeCoA-ITR"]
    assert traces["published recipe"]["x"] == [0.25]
    hover = traces["searched"]["hovertext"][0]
    assert "s-t00002-s0" in hover
    assert "temperature: 0.05" in hover
    assert "epsilon: 2/255" in hover


@pytest.mark.parametrize(("first", "shape"), [(0, "vh"), (2, "hv")])
def test_the_front_is_a_step_line_through_its_members(first: int, shape: str) -> None:
    trials = manifests()
    objectives = (OBJECTIVES[first], OBJECTIVES[1])
    line = traces_of(page_of(trials, objectives), "front")["front"]
    assert line["line"]["shape"] == shape
    xs = [entry.values[objectives[0].metric] for entry in front(trials, objectives)]
    assert line["x"] == sorted(xs)


def test_progress_shows_the_hypervolume_after_each_ended_trial() -> None:
    trace = traces_of(page_of(manifests()), "history")["hypervolume"]
    assert trace["x"] == [1, 2, 3, 4, 5]
    assert trace["y"] == pytest.approx([row[3] for row in hypervolume_history(manifests(), OBJECTIVES[:2])])


@pytest.mark.parametrize(("count", "figures"), [(1, 1), (2, 1), (3, 3), (4, 6)])
def test_every_pair_of_objectives_has_a_plot(count: int, figures: int) -> None:
    page = page_of(manifests(), OBJECTIVES[:count])
    names = re.findall(r'Plotly\.newPlot\(\s*"([\w-]+)"', page)
    assert names == ["front", *(f"pair-{index}" for index in range(figures - 1)), "history"]
    drawn = traces_of(page, "front").values()
    assert sum(len(trace["x"]) for trace in drawn if trace["name"] != "front") == 4
    assert ("front" in traces_of(page, "front")) == (count == 2)


def test_the_table_lists_the_front_with_its_settings() -> None:
    page = page_of(manifests())
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td>', page)
    third, second, first = (f"{entry.probability:.2f}" for entry in front(manifests(), OBJECTIVES[:2]))
    assert 0.5 < float(second) < 1
    assert rows == [("s-t00003-s0", "", third), ("s-t00001-s0", "", second), ("s-t00000-s0", "TeCoA-ITR", first)]
    assert '<td>0.75 <span class="interval">[0.65, 0.95]</span></td>' in page


@pytest.mark.parametrize("states", [[], ["infeasible"]])
def test_without_a_complete_trial_the_page_says_so(states: list[str]) -> None:
    page = page_of([manifest(0, 0.5, 0.5, state=state) for state in states])
    assert "No trial has been completed yet" in page
    assert "newPlot" not in page


def test_one_trial_is_a_front() -> None:
    assert traces_of(page_of([manifest(0, 0.5, 0.5)]), "front")["front"]["x"] == [0.5]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = page_of(manifests())
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", page)
    assert page.count("plotly.js v") == 1
    assert page == page_of(manifests())


def hostile() -> str:
    trial = manifest(
        0,
        0.5,
        0.5,
        key=f"key{ATTACK}",
        recipe=f"recipe{ATTACK}",
        params={f"name{ATTACK}": f"value{ATTACK}"},
        metrics={f"metric{ATTACK}": {"value": 0.5, "low": 0.4, "high": 0.6}},
    )
    objectives = (Objective(metric=f"metric{ATTACK}"), OBJECTIVES[2])
    return page_of([trial], objectives, title=f"title{ATTACK}")


def test_foreign_strings_are_escaped() -> None:
    page = hostile()
    assert "<script>alert" not in page
    assert "<img" not in page.split("</style>")[1].split("<script")[0]
    for name in ("key", "recipe", "name", "value", "metric", "title"):
        assert f"{name}&lt;script&gt;" in page, name
    shown = json.dumps(traces_of(page, "front"))
    assert "<script" not in shown
    assert "<img" not in shown


# A browser cannot be a Python dependency; the page's content is tested without one, too.
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_the_page_and_runs_no_foreign_code(tmp_path: Path) -> None:
    def dom(page: str) -> str:
        path = tmp_path / "page.html"
        path.write_text(page)
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        flags += "--disable-background-networking --disable-component-update --virtual-time-budget=5000 --dump-dom"
        command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    drawn = dom(page_of(manifests(), OBJECTIVES))
    # A point is one path in the DOM: four trials in each of six scatter plots, five in the history.
    assert len(re.findall(r'<path class="point"', drawn)) == 4 * 6 + 5
    attacked = dom(hostile())
    assert len(re.findall(r'<path class="point"', attacked)) == 2
    assert "<title>owned</title>" not in attacked
    assert "&lt;script&gt;" in attacked.split("</title>")[0]


def test_front_files_are_written_once_and_follow_the_trials(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path)
    entries = write_front_files(paths, manifests(), OBJECTIVES[:2], "A study")
    assert [entry["key"] for entry in json.loads(paths.front.read_text())] == [entry.key for entry in entries]
    before = paths.pareto_page.stat().st_mtime_ns
    write_front_files(paths, manifests(), OBJECTIVES[:2], "A study")
    assert paths.pareto_page.stat().st_mtime_ns == before
    write_front_files(paths, [*manifests(), manifest(5, 0.8, 0.8)], OBJECTIVES[:2], "A study")
    assert "s-t00005-s0" in paths.pareto_page.read_text()
