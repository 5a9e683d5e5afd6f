"""The container image, as far as it can be judged without building it."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from study import cluster
from study.clusters.files.common import PROJECT_FILES, UV

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HADOLINT = Path(sys.executable).with_name("hadolint")


def lint(text: str) -> str:
    done = subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    assert lint(TEXT) == ""
    assert "DL3006" in lint(TEXT.replace("python:3.12-slim-bookworm", "python")), "it reads what it is given"
    assert TEXT.count("hadolint ignore") == 1


def stages() -> list[str]:
    return re.split(r"^(?=FROM )", TEXT, flags=re.M)[1:]


def test_the_environment_is_the_project_s_pinned_one() -> None:
    (environment, final) = stages()
    assert f"uv=={UV}\n" in environment
    assert "exclude-newer" in PYPROJECT["tool"]["uv"]
    (python,) = set(re.findall(r"^FROM python:(3\.\d+)-", TEXT, re.M))
    assert python in SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert f"UV_PYTHON=/usr/local/bin/python{python} " in environment
    assert "--no-dev" in environment
    assert not re.search("(uv|pip) ", final)


def test_a_change_of_source_leaves_the_environment_as_it_is() -> None:
    (environment, final) = stages()
    packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert not any(f"COPY {name}" in environment for name in packages)
    places = [final.index(f"COPY {name} /opt/paretovl/{name}\n") for name in packages]
    assert all(place > final.index("COPY --from=environment") for place in places)
    assert "PYTHONPATH=/opt/paretovl " in final


def test_it_runs_as_the_user_that_kubernetes_names() -> None:
    final = stages()[-1]
    assert re.findall(r"^USER (.*)$", TEXT, re.M) == ["1000"]
    assert "useradd --uid 1000 --create-home paretovl" in final
    assert "runAsUser: 1000\n" in cluster.text(cluster.parse(["--provider", "kuberay"]))


@pytest.mark.parametrize("name", [".git", ".venv", "studies", "tests", "shared", ".env", "cluster.yaml", "uv.lock"])
def test_nothing_else_gets_into_the_image(name: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert not any(rule.startswith("!") and fnmatch.fnmatch(name, rule[1:]) for rule in rules)
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(PROJECT_FILES)
