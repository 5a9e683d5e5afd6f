"""The README tells the truth."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import BaseModel

import study.plan
import trainables.evaluate
from search_spaces.recipes import RECIPES, recipe_point
from study.config import PRESETS, parse
from study.records import StudyPaths
from trainables.attacks.registry import build_attack

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


OTHERS = r"python -m (benchmarks|study)\.(?!run|plan)(\w+)(.*)"
"""Commands that are no study: their flags are written out in their own files."""


def known_flags(model: type[BaseModel], prefix: str = "--") -> set[str]:
    flags = set()
    for name, field in model.model_fields.items():
        flag = prefix + name.replace("_", "-")
        flags.add(flag)
        if hasattr(field.annotation, "model_fields"):
            flags |= known_flags(field.annotation, flag + ".")
    return flags


def test_flags_exist() -> None:
    joined = README.replace("\\\n", " ")
    ours = [
        line
        for line in joined.splitlines()
        if not re.search(rf"mlflow ui --|\bray (up|job|exec|start|down) |{OTHERS}", line)
    ]
    ours += re.findall(r"python -m study\.run .*", joined)  # also where another program starts it
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", "\n".join(ours)))
    named = {flag.replace("--no-", "--") for flag in named}  # how a switch is turned off
    assert len(named) > 10
    assert '"--long-chaos"' in (ROOT / "tests" / "conftest.py").read_text()
    assert named - {"--help", "--long-chaos"} <= known_flags(study.plan.Arguments) | known_flags(
        trainables.evaluate.Arguments
    )


def test_flags_of_other_commands_exist() -> None:
    shared = (ROOT / "study" / "view.py").read_text()
    for package, module, rest in re.findall(OTHERS, README):
        source = shared + (ROOT / package / f"{module}.py").read_text()
        assert all(f'"{flag}"' in source for flag in re.findall(r"--[a-z-]+", rest)), module


def test_modules_and_files_exist() -> None:
    for module in set(re.findall(r"python -m ([a-z_.]+)", README)):
        assert importlib.util.find_spec(module), module
    paths = StudyPaths(Path())
    for path in (paths.config, paths.database, paths.front, paths.pareto_page, paths.mlflow_database, paths.runs):
        assert f"`{path.name}" in README
    for folder in re.findall(r"^\| `([a-z_]+)/` \|", README, flags=re.M):
        assert folder == "runs" or (ROOT / folder).is_dir()


def test_two_commands_and_what_ci_runs() -> None:
    assert "pip install uv && uv run python -m study.run\n" in README
    assert "pip install uv && uv run pytest\n" in README
    assert "uv run pytest" in (ROOT / ".ci" / "run").read_text()


def block(language: str, part: str) -> str:
    return next(text for text in re.findall(rf"```{language}\n(.*?)```", README, flags=re.S) if part in text)


def test_the_attack_of_the_how_to_works(tmp_path: Path) -> None:
    (tmp_path / "my_attack.py").write_text(block("python", "# my_attack.py"))
    text = block("yaml", "Blackout").replace("my_attack.py", str(tmp_path / "my_attack.py"))
    (tmp_path / "my_study.yaml").write_text(text)
    protocol = parse(["--config", str(tmp_path / "my_study.yaml")]).protocol
    attacks = {attack.name: build_attack(attack, protocol) for attack in protocol.attacks}
    assert list(attacks) == ["image", "both", "sga-published", "apgd", "fog-3", "typing", "mine"]
    pixels = torch.ones(1, 3, 4, 4)
    batch = SimpleNamespace(pixels=pixels, captions=lambda: ["a cat"])
    attacked = attacks["mine"].run(cast(Any, None), cast(Any, batch))
    assert attacked.pixels[0, 0].sum(1).tolist() == [0, 0, 4, 4]
    assert attacked.captions == ["a cat"]


def test_recipes_are_those_of_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([01]) \| (\d+) \| (\d) \| (\w+) \|", README, flags=re.M)
    told = {name: (float(w), int(steps), int(words), part) for name, w, steps, words, part in rows}
    points = {name: recipe_point(name, 2 / 255, 0.05) for name in RECIPES}
    assert told == {n: (p.contrastive_weight, p.attack_steps, p.words, p.trainable) for n, p in points.items()}


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_are_studies(preset: str) -> None:
    config = parse(["--preset", preset])
    assert config.name == preset
    assert "#" in (PRESETS / f"{preset}.yaml").read_text()


def test_changelog_has_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in (ROOT / "CHANGELOG.md").read_text()
