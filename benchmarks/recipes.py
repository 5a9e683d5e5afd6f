"""The published recipes side by side over several seeds: recall under every attack with intervals, and relative cost.

`python -m benchmarks.recipes --seeds 3 STUDY_FLAGS` runs one study of recipes alone a seed with the flags of
`study.run`, goes on where it was stopped, and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from search_spaces.recipes import RECIPES, Recipe
from study.front.estimates import mean_metric
from study.paths import StudyPaths
from study.records import Manifest
from study.view import read_study
from trainables.results import Metric

COMPARED: tuple[Recipe, ...] = ("finetune", "tecoa_itr", "fare", "mat", "mat_one_to_many")
ATTACKS = {"image": "PGD", "text": "BERT-Attack", "both": "Sep-Attack", "sga": "SGA"}
PUBLISHED = {"text": "bert", "both": "sep"}
"""Instead of the search of words, as in the papers."""


def cell(metric: Metric) -> str:
    """A value with its interval.

    Example:
        >>> cell(Metric(value=0.25, low=0.2, high=0.3))
        '.250 [.200, .300]'
    """
    value, low, high = (f"{number:.3f}".replace("0.", ".", 1) for number in (metric.value, metric.low, metric.high))
    return f"{value} [{low}, {high}]"


def training_seconds(manifest: Manifest) -> float:
    """Of attacking and fitting, without loading and evaluation."""
    seconds = manifest.cost["seconds"]
    assert isinstance(seconds, dict)
    return float(seconds["attack"]) + float(seconds["train"])


def table_of(runs: Mapping[Recipe, Sequence[Manifest]], measure: str) -> str:
    """Markdown: a row a recipe, a column an attack, and what training cost as a multiple of Finetune's.

    Args:
        runs: complete trials of each recipe, one a seed.
        measure: of a target, such as `mr_r10`.
    """
    targets = {"clean": "clean", **ATTACKS}
    lines = [f"| {measure} | " + " | ".join(targets.values()) + " | cost |", "|" + "---|" * (len(targets) + 2)]
    baseline = sum(map(training_seconds, runs["finetune"])) / len(runs["finetune"])
    for recipe, manifests in runs.items():
        cells = [cell(mean_metric([run.metrics[f"{target}/{measure}"] for run in manifests])) for target in targets]
        cost = sum(map(training_seconds, manifests)) / len(manifests) / baseline
        lines.append(f"| {RECIPES[recipe].title} | " + " | ".join(cells) + f" | {cost:.1f}x |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--measure", default="mr_r10", help="of every target, such as mr_r1")
    parser.add_argument("--studies-dir", type=Path, default=Path("studies"))
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point; the exit code of a study that did not end well, else 0."""
    options, flags = parser().parse_known_args(arguments)
    attacks = json.dumps([{"name": name, "attack": PUBLISHED.get(name, name)} for name in ATTACKS])
    recipes = "[" + ", ".join(f'"{recipe}"' for recipe in COMPARED) + "]"
    runs: dict[Recipe, list[Manifest]] = {recipe: [] for recipe in COMPARED}
    for seed in range(options.seeds):
        name = f"recipes-{seed}"
        fixed = ["--name", name, "--seed", str(seed), "--studies-dir", str(options.studies_dir)]
        fixed += ["--budget.trials", "0", "--recipes", recipes, "--protocol.attacks", attacks]
        code = subprocess.run([sys.executable, "-m", "study.run", *flags, *fixed], check=False).returncode
        if code:
            return code
        ended = read_study(StudyPaths(options.studies_dir / name)).manifests
        for recipe in COMPARED:
            runs[recipe] += [run for run in ended if run.recipe == recipe and run.state == "complete"]
    print(table_of(runs, options.measure))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
