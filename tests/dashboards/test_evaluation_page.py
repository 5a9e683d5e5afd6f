from __future__ import annotations

import re
from pathlib import Path

import pytest

from dashboards.evaluation_page import evaluation_page
from tests.pages import measured, needs_browser
from trainables.config import Protocol
from trainables.evaluation.examples import Answer, Example
from trainables.results import Audit, Check, EvaluationManifest, Metric

ATTACK = "<img src=x onerror=alert(1)>"
RECALLS = [f"{direction}_r{rank}" for direction in ("tr", "ir") for rank in (1, 5, 10)]


def page() -> str:
    metrics = {
        f"{target}/{name}": Metric(value=0.5, low=0.25, high=0.75)
        for target in ("clean", "both", ATTACK)
        for name in [*RECALLS, "rsum"]
    }
    del metrics["both/ir_r10"]
    check = Check(name="random start", loss="protocol", passed=False, evidence={"pgd": 0.5}, rule="r")
    manifest = EvaluationManifest(
        model=ATTACK,
        model_digest="d",
        temperature=0.1,
        transfer_from=None,
        data_digest="d",
        protocol=Protocol(),
        protocol_hash="h",
        metrics=metrics,
        audit=Audit(verdict="masked", reliable=False, checks=[check]),
        correct={},
        queries={"tr": 10, "ir": 50},
        seconds=1.0,
        versions={},
    )
    answers = [Answer(caption=f"a dog {ATTACK}", image=b"png", right=right) for right in (True, False)]
    example = Example(
        3, (b"a", b"b", b"c"), 8.0, (f"a dog {ATTACK}", f"a cat {ATTACK}"), (answers,) * 2, (answers,) * 2
    )
    return evaluation_page(manifest, "both", [example])


def test_every_measure_stands_under_its_head_and_names_are_escaped() -> None:
    shown = page()
    cells = re.findall(r'data-head="(\w+)">0\.500 <span class="interval">\[0\.250, 0\.750\]</span>', shown)
    assert len(cells) == 3 * 7 - 1
    assert cells.count("ir_r10") == 2
    assert '<td role="cell" data-head="ir_r10"></td>' in shown, "what was not measured is empty"
    assert "Gradient masking" in shown
    assert "hides its gradients from the protocol" in shown
    assert "<img src=x" not in shown
    assert "&amp;" not in shown, "escaped once"
    assert shown.count("&lt;img src=x") > 5


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_hides_on_a_phone_or_a_wide_screen(width: int, tmp_path: Path) -> None:
    found = measured(page(), width, tmp_path)
    assert (found["overflow"] <= 0, found["wide"]) == (True, 0)
