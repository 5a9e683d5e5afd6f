"""The table of recipes: means over seeds, and what training costs beside Finetune."""

from __future__ import annotations

from benchmarks.recipes import ATTACKS, table_of
from search_spaces.recipes import Recipe
from study.records import Manifest
from trainables.results import Metric


def ended(value: float, attack: float, train: float) -> Manifest:
    metric = Metric(value=value, low=value - 0.1, high=value + 0.1)
    return Manifest.model_construct(
        metrics={f"{target}/mr_r10": metric for target in ("clean", *ATTACKS)},
        cost={"seconds": {"attack": attack, "train": train, "evaluate": 100.0}},
    )


def test_values_are_means_over_seeds_and_costs_are_relative() -> None:
    runs: dict[Recipe, list[Manifest]] = {
        "finetune": [ended(0.5, 0, 10), ended(0.7, 0, 30)],
        "fare": [ended(0.4, 20, 10), ended(0.4, 40, 10)],
    }
    _, _, finetune, fare = table_of(runs, "mr_r10").splitlines()
    # 0.6 with 0.1 over images, and Student's t of two seeds: 12.7 * 0.1
    assert finetune.startswith("| Finetune | .600 [.000, 1.000] |")
    assert finetune.endswith("| 1.0x |")
    assert fare.startswith("| FARE | .400 [.300, .500] |"), "runs that agree keep the interval of the images"
    assert fare.endswith("| 2.0x |")
