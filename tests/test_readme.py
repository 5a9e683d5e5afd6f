"""The README tells the truth."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from study.config import PRESETS, Arguments, parse
from study.records import StudyPaths

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def known_flags(model: type, prefix: str = "--") -> set[str]:
    flags = set()
    for name, field in model.model_fields.items():  # type: ignore[attr-defined]
        flag = prefix + name.replace("_", "-")
        flags.add(flag)
        if hasattr(field.annotation, "model_fields"):
            flags |= known_flags(field.annotation, flag + ".")
    return flags


def test_flags_exist() -> None:
    joined = README.replace("\\\n", " ")
    ours = [
        line for line in joined.splitlines() if not re.search(r"mlflow ui --|\bray (up|job|exec|start|down) ", line)
    ]
    ours += re.findall(r"python -m study\.run .*", joined)  # also where another program starts it
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", "\n".join(ours)))
    assert len(named) > 10
    assert named - {"--help", "--rebuild"} <= known_flags(Arguments)


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


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_are_studies(preset: str) -> None:
    config = parse(["--preset", preset])
    assert config.name == preset
    assert "#" in (PRESETS / f"{preset}.yaml").read_text()


def test_changelog_has_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in (ROOT / "CHANGELOG.md").read_text()
