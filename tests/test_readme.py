"""The README tells the truth."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
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
from study.arguments import PRESETS, parse
from study.paths import StudyPaths
from tests.commands import read_line
from tests.study.helpers import complete, opened, run_next
from tests.study.helpers import study as small_study
from trainables.attacks.registry import build_attacks
from trainables.cli.command import read_config
from trainables.config import TrialConfig
from trainables.evaluation.protocols import named_protocol
from trainables.evaluation.robustness import evaluate
from trainables.prepare import prepare

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
    ours = [line for line in joined.splitlines() if not re.search(rf"mlflow ui --|{OTHERS}", line)]
    ours += re.findall(r"python -m study\.run .*", joined)  # also where another program starts it
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", "\n".join(ours)))
    named = {flag.replace("--no-", "--") for flag in named}  # how a switch is turned off
    assert len(named) > 10
    assert '"--long-chaos"' in (ROOT / "tests" / "conftest.py").read_text()
    assert named - {"--help", "--help-all", "--long-chaos"} <= known_flags(study.plan.Arguments) | known_flags(
        trainables.evaluate.Arguments
    )


COMMANDS = [
    line.strip()
    for text in re.findall(r"^```bash\n(.*?)^```", README, flags=re.S | re.M)
    for line in text.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bash, and by the parsers that it meets, with a file or folder where the page has a word in capitals."""
    monkeypatch.chdir(tmp_path)
    for folder in ("DIR", "MODEL"):
        (tmp_path / folder).mkdir()
    for file in ("FILE", "my_study.yaml", "sga.yaml"):
        (tmp_path / file).touch()
    while variable := re.match(r"(PARETOVL_\w+)=(\S+) ", line):
        monkeypatch.setenv(variable[1], variable[2])
        line = line.removeprefix(variable[0])
    read_line(line.replace("FLAGS", "--preset real_small"))


def test_commands_about_a_study_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that take seconds and no network; `quickstart` and the studies of the comparison are there."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("quickstart", "clip", "albef", "blip")):
        config = small_study(Path("studies"), name=name, recipes=(), sampler="random")
        ledger = opened(config)
        for clean in (0.9, 0.5):
            run_next(ledger, config, complete(clean - number / 100, 1 - clean))
    (tmp_path / "DIR").mkdir()
    photos = [
        {
            "filepath": "val2014",
            "filename": f"{number}.jpg",
            "split": split,
            "cocoid": number,
            "sentences": [{"raw": "a cat", "sentid": 5 * number + k, "imgid": number} for k in range(5)],
        }
        for number, split in enumerate(("train", "val", "test"))
    ]
    (tmp_path / "DIR" / "dataset_coco.json").write_text(json.dumps({"images": photos}))
    ran = set()
    for line in COMMANDS:
        words = shlex.split(line)
        module = words[4] if words[:4] == ["uv", "run", "python", "-m"] else ""
        if module not in ("study.plan", "study.status", "study.export", "study.compare", "study.track"):
            continue
        if "--trial" not in words:  # that is of a study with more trials
            assert importlib.import_module(module).main(words[5:]) == 0, line
            assert capsys.readouterr().out
            ran.add(module)
    assert len(ran) == 5
    assert (tmp_path / "studies" / "quickstart" / "export" / "trials.parquet").exists()
    assert (tmp_path / "studies" / "comparison.html").exists()


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


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


YAMLS = blocks("yaml")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a reader works in, with the Python files of this page."""
    for text in blocks("python"):
        (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", YAMLS, ids=[str(index) for index in range(len(YAMLS))])
def test_every_file_can_be_used(text: str, files: Path, tiny_trial: TrialConfig) -> None:
    """Each loads, and what it measures is measured, on a small model and with the threat model checked."""
    name = text.splitlines()[0].removeprefix("# ")
    (files / name).write_text(text)
    if name == "config.yaml":
        protocol = read_config(Path(name)).protocol
    elif name == "sga.yaml":
        protocol = named_protocol(name, {})
    else:
        protocol = parse(["--config", name]).protocol
    small = {"gallery_images": 12, "image_steps": 2, "bootstrap_samples": 100}
    config = tiny_trial.model_copy(update={"protocol": protocol.model_copy(update=small)})
    prepared = prepare(config)
    found = evaluate(
        prepared.base,
        prepared.gallery,
        config.protocol,
        max_tokens=config.model.max_tokens,
        device=torch.device("cpu"),
    )
    assert set(found.ranks) == set(config.protocol.targets)


def test_the_attack_of_the_how_to_does_what_it_says(files: Path) -> None:
    (text,) = (text for text in YAMLS if "Blackout" in text)
    (files / "my_study.yaml").write_text(text)
    protocol = parse(["--config", "my_study.yaml"]).protocol
    attack = build_attacks(protocol)["mine"]
    assert attack.epsilon == 1, "not the protocol's"
    pixels = torch.ones(1, 3, 4, 4)
    attacked = attack.run(cast(Any, None), cast(Any, SimpleNamespace(pixels=pixels, captions=lambda: ["a cat"])))
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
