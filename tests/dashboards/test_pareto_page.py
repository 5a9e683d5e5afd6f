from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashboards.page import INK
from dashboards.pareto_page import pareto_page, write_front_files
from dashboards.scatter import COLOURS, pairs_by_conflict
from search_spaces.recipes import recipe_point
from study.front.estimates import front
from study.front.hypervolume import hypervolume_history
from study.paths import StudyPaths
from tests.dashboards.trials import ATTACK, OBJECTIVES, manifest, manifests, page_of
from tests.pages import layout_of, traces_of
from trainables.config import Protocol
from trainables.results import Caveat


def test_every_complete_trial_is_drawn_once_with_interval_and_colour() -> None:
    page = page_of(manifests())
    traces = traces_of(page, "front")
    assert traces["searched"]["x"] == [0.25]
    assert traces["searched"]["y"] == [0.5]
    assert traces["searched, on the front"]["x"] == [0.5, 0.75]
    assert traces["searched, on the front"]["error_x"]["array"] == pytest.approx([0.2, 0.2])
    assert traces["searched, on the front"]["error_x"]["arrayminus"] == pytest.approx([0.1, 0.1])
    assert traces["searched, on the front"]["marker"]["color"] == pytest.approx([1, 3])
    assert traces["published recipe, on the front"]["x"] == [0.25]
    assert [label["text"] for label in layout_of(page, "front")["annotations"]] == ["TeCoA-ITR"]
    hover = traces["searched"]["hovertext"][0]
    assert "s-t00002-s0" in hover
    assert "temperature: 0.15" in hover
    assert "both/mr_r5: 0.250 [0.150, 0.450]" in hover


def test_outlined_means_on_the_front_and_nothing_else() -> None:
    trials = [*manifests(), manifest(5, 0.2, 0.2, recipe="mat"), manifest(6, 0.1, 0.1, recipe="fare")]
    for count in (2, 3):
        traces = traces_of(page_of(trials, OBJECTIVES[:count]), "front")
        outlined = {name: trace["marker"]["line"]["width"] for name, trace in traces.items() if "marker" in trace}
        assert {name for name, width in outlined.items() if width} == {
            "searched, on the front",
            "published recipe, on the front",
        }
        assert len(traces["published recipe"]["x"]) == 2
        symbols = {name: trace["marker"]["symbol"] for name, trace in traces.items() if "marker" in trace}
        assert {name for name, symbol in symbols.items() if symbol == "star"} == {
            "published recipe",
            "published recipe, on the front",
        }


def luminance(colour: str) -> float:
    """Relative, as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", COLOURS)
def test_marks_differ_from_the_page_and_from_the_outline_of_the_front(colour: str) -> None:
    page, mark, outline = (luminance(given) + 0.05 for given in ("#ffffff", colour, INK))
    assert page / mark >= 3, "WCAG 2.1, 1.4.11"
    assert mark / outline >= 3
    for trace in traces_of(page_of(manifests()), "front").values():
        assert "opacity" not in trace.get("marker", {}), "it would be paler than that"


@pytest.mark.parametrize(
    ("low", "expected"), [(0.02, ["0.02", "0.05", "0.1", "0.2"]), (1e-4, ["0.0001", "0.001", "0.01", "0.1"])]
)
def test_ratios_have_few_ticks_however_far_apart(low: float, expected: list[str]) -> None:
    trials = [
        manifest(n, n / 4, 1 - n / 4, params={"temperature": at}, point={"temperature": at})
        for n, at in enumerate((low, 0.2))
    ]
    assert layout_of(page_of(trials), "knob-0")["xaxis2"]["ticktext"] == expected


def test_replicates_are_one_point_with_their_mean() -> None:
    trials = [manifest(0, 0.5, 0.5), manifest(1, 0.7, 0.7, key="s-t00000-s1", replicate=1)]
    trace = traces_of(page_of(trials), "front")["searched, on the front"]
    assert trace["x"] == pytest.approx([0.6])
    assert "mean of 2 runs" in trace["hovertext"][0]


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
    shares = [row[3] for row in hypervolume_history(manifests(), OBJECTIVES[:2])]
    assert trace["y"] == pytest.approx([100 * share for share in shares])


def test_ticks_of_a_small_hypervolume_can_be_told_apart() -> None:
    trials = [manifest(number, 0.001 * number, 0.001 * number) for number in range(1, 5)]
    page = page_of(trials)
    assert max(traces_of(page, "history")["hypervolume"]["y"]) < 1.5, "in percent"
    assert "tickformat" not in layout_of(page, "history")["yaxis"], "a fixed number of digits cannot fit every range"
    assert re.search(r"hypervolume 0\.\d\d+ % of the box", page)


@pytest.mark.parametrize(("count", "figures"), [(1, 1), (2, 1), (3, 3), (4, 6)])
def test_every_pair_of_objectives_has_a_plot_and_its_own_front(count: int, figures: int) -> None:
    page = page_of(manifests(), OBJECTIVES[:count])
    names = re.findall(r'Plotly\.newPlot\(\s*"([\w-]+)"', page)
    assert names == ["front", *(f"pair-{index}" for index in range(1, figures)), "knob-0", "history"]
    for name in names[:figures]:
        drawn = traces_of(page, name)
        assert sum(len(trace["x"]) for trace in drawn.values() if trace["name"] != "front") == 4
        assert ("front" in drawn) == (count > 1)
        assert [label["text"] for label in layout_of(page, name)["annotations"]] == ["TeCoA-ITR"]


def test_the_pair_that_conflicts_most_is_the_large_one() -> None:
    objectives = (OBJECTIVES[1], OBJECTIVES[3], OBJECTIVES[0])
    values = [(0.9, 0.5, 0.1), (0.8, 0.5, 0.2), (0.7, 0.6, 0.3), (0.95, 0.4, 0.05)]
    assert pairs_by_conflict(values, objectives) == [(0, 2), (0, 1), (1, 2)]
    assert pairs_by_conflict(values[:1], objectives)[0] == (0, 1), "without a conflict the first pair"
    page = page_of(manifests(), OBJECTIVES[:3])
    assert layout_of(page, "front")["xaxis"]["title"]["text"].startswith("both/mr_r5")
    assert layout_of(page, "front")["height"] > layout_of(page, "pair-1")["height"]


def test_plots_are_about_the_front_and_say_what_lies_beyond() -> None:
    trials = [*manifests(), manifest(5, 0.01, 0.01), manifest(6, 0.02, 0.01)]
    page = page_of(trials)
    assert "2 of the trials lie beyond the edges" in page
    low, high = layout_of(page, "front")["yaxis"]["range"]
    assert low < 0.15
    assert high > 0.85
    assert "beyond the edges" not in page_of(manifests())


def test_every_objective_is_drawn_against_every_knob_that_varies() -> None:
    knobs = [
        {"temperature": 0.01, "words": 0, "temperature_learned": True, "epsilon": 0.0, "trainable": "all"},
        {"temperature": 0.2, "words": 2, "temperature_learned": False, "epsilon": 8 / 255, "trainable": "all"},
        {"temperature": 0.05, "words": 1, "temperature_learned": True, "epsilon": 2 / 255, "trainable": "all"},
    ]
    page = page_of([manifest(n, n / 4, 1 - n / 4, params=at, point=at) for n, at in enumerate(knobs)], OBJECTIVES[:3])
    layouts = [layout_of(page, name) for name in re.findall(r'Plotly\.newPlot\(\s*"(knob-\d)"', page)]
    titles = [layout["xaxis3"]["title"]["text"] for layout in layouts]
    assert titles == ["τ", "learn τ", "ε, in 1/255", "words"], "trainable does not vary"
    assert layouts[0]["xaxis3"]["type"] == "log"
    assert layouts[0]["xaxis3"]["ticktext"] == ["0.01", "0.02", "0.05", "0.1", "0.2"]
    assert layouts[1]["xaxis3"]["ticktext"] == ["no", "yes"]
    assert layouts[3]["xaxis3"]["tickvals"] == [0, 1, 2]
    drawn = traces_of(page, "knob-2")["searched, on the front"]
    assert sorted(drawn["x"]) == pytest.approx([0, 2, 8])
    assert set(traces_of(page, "knob-1")["searched, on the front"]["x"]) == {0, 1}


def table_of(page: str) -> list[dict[str, str]]:
    """Rows of the table, by the heads of their columns."""
    body = page.split("<tbody")[1].split("</tbody>")[0]
    rows = []
    for row in body.split("<tr")[1:]:
        cells = re.findall(r'<td role="cell" data-head="([^"]*)">(.*?)</td>', row)
        rows.append({head: re.sub("<[^>]*>", "", cell) for head, cell in cells})
        rows[-1]["trial"] = re.sub("<[^>]*>", "", row.split("</th>")[0].split('role="rowheader">')[1])
    return rows


def test_the_table_lists_the_front_and_the_recipes_with_all_their_settings() -> None:
    settings = {"contrastive_weight": 0.25, "temperature": 0.05, "epsilon": 1 / 255, "attack_steps": 5, "words": 1}
    changes: dict[str, Any] = {"params": settings, "point": settings}
    plain = {"recipe": "finetune", "params": {}, "point": {**settings, "epsilon": 0, "attack_steps": 0}}
    trials = [one.model_copy(update={**changes, "params": {} if one.recipe else settings}) for one in manifests()]
    trials.append(manifest(5, 0.1, 0.1, **plain))
    rows = table_of(page_of(trials))
    probabilities = [f"{entry.probability:.2f}" for entry in front(trials, OBJECTIVES[:2])]
    assert [(row["trial"], row["recipe"], row["on the front"]) for row in rows] == [
        ("t00003", "", probabilities[0]),
        ("t00001", "", probabilities[1]),
        ("t00000", "TeCoA-ITR", probabilities[2]),
        ("t00005", "Finetune", "no"),
    ]
    assert rows[0]["both/mr_r5"] == "0.750 [0.650, 0.950]"
    assert [rows[0][head] for head in ("w", "τ", "ε", "steps", "words")] == ["0.25", "0.05", "1", "5", "1"]
    assert [rows[3][head] for head in ("ε", "steps")] == ["0", "–"]


@pytest.mark.parametrize("states", [[], ["infeasible"]])
def test_without_a_complete_trial_the_page_says_so(states: list[str]) -> None:
    page = page_of([manifest(0, 0.5, 0.5, state=state) for state in states])
    assert "No trial has been completed yet" in page
    assert "newPlot" not in page


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_trial_that_measured_something_else_is_no_obstacle(count: int) -> None:
    other = manifest(5, 0.5, 0.5, metrics={"sga/mr_r5": {"value": 0.5, "low": 0.4, "high": 0.6}}, recipe="mat", cost={})
    page = page_of([*manifests(), other], OBJECTIVES[:count])
    assert [label["text"] for label in layout_of(page, "front")["annotations"]] == ["TeCoA-ITR"]
    assert "beyond the edges" not in page
    assert table_of(page)[-1]["both/mr_r5"] == ""
    for recipe in ("mat", None):
        alone = other.model_copy(update={"recipe": recipe})
        assert "newPlot" in page_of([alone], OBJECTIVES[:count]), "nothing is on the front"


def test_hovering_tells_what_is_a_recipes_own() -> None:
    fare = recipe_point("fare", 2 / 255, 0.06).model_dump(mode="json")
    trial = manifest(0, 0.5, 0.5, recipe="fare", params={}, point=fare)
    text = traces_of(page_of([trial]), "front")["published recipe, on the front"]["hovertext"][0]
    assert text.split("<br>")[4:] == [
        "contrastive_weight: 0",
        "temperature: 0.06",
        "epsilon: 2/255",
        "attack_steps: 10",
        "companion: anchor",
        "trainable: image",
        "attack_objective: deviation",
    ]


def test_one_trial_is_a_front() -> None:
    assert traces_of(page_of([manifest(0, 0.5, 0.5)]), "front")["front"]["x"] == [0.5]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = page_of(manifests())
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", page)
    assert page.count("plotly.js v") == 1
    assert page == page_of(manifests())


def test_of_a_large_study_some_trials_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn of it looks as it does where all are drawn."""
    arc = [(math.sin(turn), math.cos(turn)) for turn in np.linspace(0, math.pi / 2, 200)]
    trials = [manifest(number, x, y) for number, (x, y) in enumerate(arc)]
    trials += [manifest(200 + number, 0.6 * x, 0.6 * y) for number, (x, y) in enumerate(arc)]
    trials += [manifest(400 + number, 0.4, 0.4, recipe="mat") for number in range(3)]
    trials += [manifest(403 + number, 0, 0, state="stopped") for number in range(700)]
    page = page_of(trials)
    assert "Of 403 complete trials 303 are drawn, here and below, spread over the objectives" in page
    assert "One trial in 3 has a mark" in page
    assert "50 more points of the front are in front.json" in page
    assert len(table_of(page)) == 150 + 3
    progress = traces_of(page, "history")["hypervolume"]["x"]
    assert len(progress) == 368
    assert progress[-1] == 1103
    monkeypatch.setattr("study.front.estimates.SHOWN", 1000)
    whole = page_of(trials)
    assert "trials 403 are drawn" not in whole
    assert "more points" not in whole
    assert len(table_of(whole)) == 200 + 3
    assert layout_of(page, "front") == layout_of(whole, "front")
    assert all(row in table_of(whole) for row in table_of(page))
    for name in ("front", "knob-0"):
        drawn, full = traces_of(page, name), traces_of(whole, name)
        assert drawn.keys() == full.keys()
        assert drawn.get("front") == full.get("front"), "the line is that of all trials"
        for trace in ("searched", "searched, on the front", "published recipe"):
            marks, others = marks_of(drawn[trace]), marks_of(full[trace])
            assert marks <= others
            assert len(marks) == min(len(others), 150)
            assert {min(marks)[:2], max(marks)[:2]} == {min(others)[:2], max(others)[:2]}, "the best ones are there"


def marks_of(trace: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Place, colour and hover text of each mark with its bars."""
    bars = (trace["error_x"]["array"], trace["error_y"]["arrayminus"])
    return set(zip(trace["x"], trace["y"], trace["marker"]["color"], trace["hovertext"], *bars, strict=True))


def test_what_has_to_be_known_first_comes_first() -> None:
    found = manifests()
    entries, history = front(found, OBJECTIVES[:2]), hypervolume_history(found, OBJECTIVES[:2])
    caveats = [Caveat(text="the gallery has <b>few</b> images"), Caveat(text="at chance", void=True)]
    page = pareto_page(found, entries, OBJECTIVES[:2], history, "A study", caveats)
    assert "<li>the gallery has &lt;b&gt;few&lt;/b&gt; images</li>\n<li>at chance</li>" in page
    assert page.index("Before you rely on this") < page.index("<h2>Front</h2>")
    assert "Before you rely on this" not in page_of(found)


def test_front_files_are_written_once_and_follow_the_trials(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path)
    entries = write_front_files(paths, manifests(), OBJECTIVES[:2], "A study", Protocol())
    assert [entry["key"] for entry in json.loads(paths.front.read_text())] == [entry.key for entry in entries]
    before = paths.pareto_page.stat().st_mtime_ns
    write_front_files(paths, manifests(), OBJECTIVES[:2], "A study", Protocol())
    assert paths.pareto_page.stat().st_mtime_ns == before
    write_front_files(paths, [*manifests(), manifest(5, 0.8, 0.8)], OBJECTIVES[:2], "A study", Protocol())
    assert "s-t00005-s0" in paths.pareto_page.read_text()
    equal = [manifest(1, 0.5, 0.5), manifest(2, 0.5, 0.5)]
    write_front_files(paths, equal, OBJECTIVES[:2], "A study", Protocol())
    assert "all 2 complete trials are equal in every objective" in paths.pareto_page.read_text()


def test_each_trial_without_a_result_is_named_with_the_reason() -> None:
    lost = [manifest(n, 0, 0, state="failed", reason=f"lost: {ATTACK}", metrics={}) for n in range(3, 16)]
    diverged = manifest(2, 0, 0, state="infeasible", reason="Diverged: nan", metrics={})
    for complete in ([manifest(0, 0.2, 0.3)], []):
        page = page_of([*complete, diverged, *lost])
        table = page[page.index("Without a result") :]
        row = table.index("t00003, t00004"), table.index("t00012 and 3 more"), table.index("lost: &lt;script&gt;")
        assert list(row) == sorted(row)
        assert table.index("Diverged: nan") > table.index(">t00002<") > 0
    assert "Without a result" not in page_of([manifest(0, 0.2, 0.3), manifest(1, 0.2, 0.3, state="stopped")])
