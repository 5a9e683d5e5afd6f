"""The page where it is looked at: nothing of it hides, and nothing that trials are called runs as code."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from study.config import Objective
from study.records import Manifest
from tests.dashboards.trials import ATTACK, OBJECTIVES, manifest, manifests, page_of
from tests.pages import dom_of, measured, needs_browser, traces_of


def table_section_of(page: str) -> str:
    return page[page.index("<table") : page.index("</table>")]


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
    assert "<img" not in table_section_of(page)
    for name in ("key", "recipe", "name", "value", "metric", "title"):
        assert f"{name}&lt;script&gt;" in page, name
    shown = json.dumps(traces_of(page, "front"))
    assert "<script" not in shown
    assert "<img" not in shown


@needs_browser
def test_a_browser_draws_the_page_and_runs_no_foreign_code(tmp_path: Path) -> None:
    def dom(page: str) -> str:
        path = tmp_path / "page.html"
        path.write_text(page)
        return dom_of(path)

    drawn = dom(page_of(manifests(), OBJECTIVES))
    # A point is one path in the DOM: four trials in each of six scatter plots and against the knob by each of four
    # objectives, five in the history.
    assert len(re.findall(r'<path class="point"', drawn)) == 4 * 6 + 4 * 4 + 5
    attacked = dom(hostile())
    assert len(re.findall(r'<path class="point"', attacked)) == 2
    assert "<title>owned</title>" not in attacked
    assert "&lt;script&gt;" in attacked.split("</title>")[0]


def crowd() -> list[Manifest]:
    """Recipes close together among searched trials, with all knobs: as studies are at their best corner."""
    draw = random.Random(0)
    settings = {"contrastive_weight": 0.005678, "temperature": 0.065786, "temperature_learned": False, "words": 1}
    settings |= {"epsilon": 0.0035, "attack_steps": 10}
    recipes = ("finetune", "tecoa_itr", "fare", "mat", "mat_one_to_many", "mmcoa")
    return [
        manifest(
            number,
            0.5 + draw.gauss(0, 0.02),
            0.5 + draw.gauss(0, 0.02),
            recipe=recipes[number] if number < len(recipes) else None,
            params=settings,
            point={**settings, "words": number % 3},
        )
        for number in range(20)
    ]


@needs_browser
@pytest.mark.parametrize("width", [390, 1050, 1280])
def test_nothing_hides_on_a_phone_or_a_wide_screen(width: int, tmp_path: Path) -> None:
    found = measured(page_of(crowd(), OBJECTIVES), width, tmp_path)
    assert found["width"] == width
    assert found["overflow"] <= 0, "the page is wider than the screen"
    assert found["wide"] == 0, "knobs of the table are behind a scroll"
    assert len(found["labels"]) == 6 * 6
    assert found["touching"] == []
