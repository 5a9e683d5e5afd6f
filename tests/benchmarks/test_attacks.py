"""The benchmarks say whether results are equal, and their arithmetic is that of the papers."""

from __future__ import annotations

import pytest

from benchmarks import Row
from benchmarks.attacks import table_of, text_rows
from benchmarks.cost import projection, tower_flops
from trainables.config import TinyConfig

CAPTIONS = [
    "a man rides a red bike on a dirt road",
    "two dogs run after a yellow ball on the beach",
    "a kitchen with a stove a microwave and a refrigerator",
    "a young girl blows out candles on a birthday cake",
]


def test_the_text_attack_is_compared_at_equal_captions() -> None:
    alone, included = text_rows(CAPTIONS, 4, TinyConfig(width=32, layers=1, heads=2))
    assert alone.equal
    assert included.equal
    assert 0 < alone.seconds < included.seconds
    assert alone.reference_seconds == included.reference_seconds


def test_a_row_shows_its_ratio_and_whether_results_are_equal() -> None:
    assert "4.0x  False" in table_of([Row("some attack", 8.0, 2.0, False, "of something")])


def test_a_vit_b_16_has_the_published_number_of_operations() -> None:
    """17.6 GMAC at 224 pixels with patch embedding and head (Dosovitskiy et al. 2021, as torchvision counts)."""
    assert tower_flops(12, 768, 197) / 2e9 == pytest.approx(17.6, rel=0.02)


def test_the_projection_adds_up() -> None:
    from transformers import CLIPTextConfig, CLIPVisionConfig

    lines = projection(25_010, 18.0, 12.6, CLIPTextConfig(), CLIPVisionConfig(patch_size=16))
    parts = [float(line.split("=")[1].split()[0]) for line in lines if line.endswith("PFLOP")]
    total = float(lines[-1].split()[1])
    assert sum(parts) == pytest.approx(total, abs=1)
    assert total * 1e15 / (312e12 * 0.4) / 60 == pytest.approx(float(lines[-1].split()[-2]), abs=1)
