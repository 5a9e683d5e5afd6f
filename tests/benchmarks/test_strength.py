"""What is read off the ranks: the worst of several attacks, and what only one of them breaks."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.strength import only, recall, report, worst
from trainables.evaluation.retrieval import Ranks

OWNER = np.array([0, 0, 1, 1])


def ranks(tr: list[int], ir: list[int]) -> Ranks:
    return Ranks(np.array(tr), np.array(ir), OWNER)


FOUND = {"image": ranks([2, 1], [1, 1, 3, 1]), "text": ranks([1, 1], [1, 4, 5, 1]), "both": ranks([2, 1], [1, 1, 1, 1])}


def test_the_worst_is_query_by_query() -> None:
    together = worst(list(FOUND.values()))
    assert together.tr.tolist() == [2, 1]
    assert together.ir.tolist() == [1, 4, 5, 1]
    assert recall(together, 1) == (50, 50)
    assert recall(together, 4) == (100, 75)


def test_what_others_break_too_does_not_count() -> None:
    assert only(FOUND, "text", 1) == pytest.approx(12.5), "one caption of four, and half of the mean"
    assert only(FOUND, "image", 1) == 0
    assert only(FOUND, "both", 1) == 0


def test_the_report_has_a_row_for_every_attack_and_two_for_all() -> None:
    tables = {name: {"mat": (found, 2.0)} for name, found in FOUND.items()}
    text = report(tables, ["image", "text"], ["both"], ["mat"])
    assert "| text | 100.0 / 50.0 and 100.0 / 100.0 | 2 |" in text
    assert "| **`strong`, all together** | 50.0 / 50.0 and 100.0 / 100.0 | 4 |" in text
    assert "| **reference, all together** | 50.0 / 50.0 and 100.0 / 100.0 | 6 |" in text
    assert "| text | 12.5 and 0.0 |" in text
