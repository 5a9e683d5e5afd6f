"""What `--help` of every command says: at once, as wide as the terminal, the values in effect, examples that work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import study.cluster
import study.plan
import trainables.evaluate
from study.arguments import Arguments, parse
from tests.commands import read_command
from trainables.cli.command import fields_of
from trainables.cli.flags import Flags
from trainables.cli.help import asked, groups_of, in_words, values_of
from trainables.config import TrialConfig
from trainables.errors import InputError

COMMANDS = [
    *(
        f"study.{name}"
        for name in ("run", "plan", "status", "certify", "compare", "export", "track", "cluster", "doctor", "submit")
    ),
    *(f"trainables.{name}" for name in ("trial", "evaluate", "pretrain")),
    "study.clusters.nodes.notices",
]
SCHEMAS: list[type[Flags]] = [Arguments, study.plan.Arguments, trainables.evaluate.Arguments]
HEAVY = ("torch", "ray", "mlflow", "transformers", "optuna", "plotly", "pandas")
SCRIPT = f"""
import atexit, importlib, sys
atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr))
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [80, 100])
def test_help_comes_at_once_fits_and_has_examples(
    command: str, width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    began = os.times()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": str(width)},
    )
    ended = os.times()
    assert sum(ended[2:4]) - sum(began[2:4]) < 1.5, "processor time, on a busy machine"
    assert done.stderr == "[]\n", "the help must not wait for libraries it does not need"
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < 90
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_study.yaml").touch()
    examples = re.findall(r"^  (python -m .*)", done.stdout, flags=re.M)
    assert examples
    for example in examples:
        module, _ = read_command(example)
        assert module == command


def helped(capsys: pytest.CaptureFixture[str], *given: str, schema: type[Arguments] = Arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(given, schema)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def shown_values(text: str) -> dict[str, str]:
    """Values by flag; one that goes on in further lines has blanks for these breaks."""
    found: dict[str, str] = {}
    flag = ""
    for line in text.splitlines():
        if match := re.match(r"  --(?:\[no-\])?([\w.-]+)", line):
            flag = match[1]
            found[flag] = line[46:].strip() if line[44:46].strip() == "" else ""
        elif flag and line.startswith(" " * 46):
            found[flag] = f"{found[flag]} {line.strip()}".strip()
    return found


def test_the_values_are_those_in_effect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("PARETOVL_SEED", "7")
    monkeypatch.chdir(tmp_path)  # a whole path may be broken into lines at a hyphen
    Path("my.yaml").write_text("budget: {trials: 33}\n")
    given = ["--preset", "coco_albef", "--config", "my.yaml", "--protocol.epsilon", "1/255"]
    shown = shown_values(helped(capsys, *given, "--help-all"))
    config = parse(given)
    assert shown == {
        path.replace("_", "-"): " ".join(in_words(value, path).split())
        for path, value in values_of(config).items()
        if path in {path for part in groups_of(Arguments).values() for path, _ in part}
    }
    assert shown["protocol.epsilon"] == "1/255"
    assert shown["budget.trials"] == "33"
    assert shown["seed"] == "7"
    assert shown["trial.model.max-tokens"] == "30", "the preset's"
    assert shown["objectives"] == "clean/mr_r1, both/mr_r1, both.itm/mr_r1"
    assert shown["cluster.address"] == "empty"


def test_the_short_help_leads_to_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    short, budget = helped(capsys, "--help"), helped(capsys, "-h", "budget")
    assert "--budget.trials TRIALS" in short
    assert "--budget.plateau-trials" not in short
    assert "  budget " in short
    assert set(shown_values(budget)) == {f"budget.{name.replace('_', '-')}" for name in parse([]).budget.model_fields}
    assert "--budget.trial-hours HOURS" in budget
    assert "(above 0)" in budget
    model = helped(capsys, "--help", "trial.model")
    assert "--trial.model.tiny.width" in model, "with the groups below it"
    assert "--trial.workers.count" not in model
    everything = helped(capsys, "--help-all", schema=study.plan.Arguments)
    assert "--device NAME" in everything
    assert "a100-80g, h100, l4, cpu" in everything
    with pytest.raises(InputError, match=r"no group 'bugdet'; groups are general, protocol, .*budget"):
        parse(["--help", "bugdet"])


def test_help_comes_over_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "most used" in helped(capsys, "--budget.trials", "many", "--help")
    assert "most used" in helped(capsys, "--nonsense", "--help")


@pytest.mark.parametrize("schema", SCHEMAS)
def test_common_fields_exist_and_every_flag_is_described(schema: type[Flags]) -> None:
    fields = [field for part in groups_of(schema).values() for field in part]
    assert set(schema.common_fields) <= {path for path, _ in fields}
    assert len(schema.common_fields) < 20
    assert [path for path, field in fields if not field.description] == []
    assert [path for path, field in fields_of(TrialConfig) if "point." in path and not field.description] == []


@pytest.mark.parametrize(
    ("given", "group", "rest"),
    [
        (["--name", "x"], None, ["--name", "x"]),
        (["--help"], "", []),
        (["--name", "x", "-h", "data", "--seed", "1"], "data", ["--name", "x", "--seed", "1"]),
        (["--help", "--seed", "1"], "", ["--seed", "1"]),
        (["--seed", "1", "--help-all"], "all", ["--seed", "1"]),
    ],
)
def test_which_help_is_asked_for(given: list[str], group: str | None, rest: list[str]) -> None:
    assert asked(given) == (group, rest)


def test_whoever_stops_reading_gets_no_traceback() -> None:
    command = f"{sys.executable} -m study.run --help data | head -1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert run.stdout.count("\n") == 1
    assert run.stderr == ""


def test_what_is_decided_later_is_not_shown_as_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, shown in (([], "as the model's family does"), (["--data.image-pixels", "96"], "96")):
        with pytest.raises(SystemExit):
            trainables.evaluate.main([*flags, "--help"])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "--data.image-pixels" in line]
        assert line.endswith(shown)


@pytest.mark.parametrize("provider", study.cluster.PROVIDERS)
def test_a_command_without_fields_used_most_shows_all(provider: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.cluster.parse(["--provider", provider, "--help"])
    text = capsys.readouterr().out
    schema = type(study.cluster.parse(["--provider", provider]))
    assert {f"--{name.replace('_', '-')}" for name in schema.model_fields} <= set(text.split())
    assert "most used" not in text
