"""Where a study's settings come from, and what makes its trials comparable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from study.arguments import PRESETS, Arguments, parse
from study.config import StudyConfig
from study.ledger.frozen import fingerprint, freeze, load_frozen
from study.ledger.trials import trial_template
from study.paths import StudyPaths
from study.records import read_frozen
from study.run import opening_line
from trainables.errors import InputError
from trainables.identity import differences


@pytest.fixture(autouse=True)
def no_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the checkout would be gone on with."""
    monkeypatch.setenv("PARETOVL_STUDIES_DIR", str(tmp_path / "none"))


HEAVY = ("torch", "ray", "transformers", "mlflow", "optuna", "numpy", "pandas")


def test_later_sources_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = yaml.safe_load((PRESETS / "quickstart.yaml").read_text())
    assert parse([]).budget.trials == preset["budget"]["trials"] != 3
    file = tmp_path / "study.yaml"
    file.write_text("budget: {trials: 3}\nprotocol: {epsilon: 1/255}\ntrial: {workers: {count: 2}}\n")
    of_file = parse(["--config", str(file)])
    assert (of_file.budget.trials, of_file.protocol.epsilon, of_file.trial.workers.count) == (3, 1 / 255, 2)
    assert of_file.trial.training.epochs == preset["trial"]["training"]["epochs"], "fields beside are kept"
    monkeypatch.setenv("PARETOVL_BUDGET__TRIALS", "4")
    assert parse(["--config", str(file)]).budget.trials == 4
    assert parse(["--config", str(file), "--budget.trials", "5"]).budget.trials == 5


def test_a_space_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("space: {temperature: {kind: float, low: 0.01, high: 0.1}}\n")
    assert list(parse(["--config", str(file)]).space) == ["temperature"]


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_are_valid_and_name_their_study(preset: str) -> None:
    assert parse(["--preset", preset]).name == preset


def test_help_comes_at_once() -> None:
    script = f"import sys, study.run; print([m for m in {HEAVY} if m in sys.modules]); study.run.main(['--help'])"
    seconds = []
    for _ in range(3):
        began = os.times()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        ended = os.times()  # processor time: what the machine does besides is not the help's
        seconds.append(sum(ended[2:4]) - sum(began[2:4]))
    assert done.stdout.startswith("[]\n"), "the help must not wait for libraries it does not need"
    assert "--trial.training.epochs" in done.stdout
    assert min(seconds) < 1


def frozen(folder: Path, *flags: str, data: str = "d", code: str = "c") -> tuple[Arguments, dict[str, Any]]:
    config = parse(["--studies-dir", str(folder), *flags])
    config.paths.root.mkdir(parents=True, exist_ok=True)
    return config, fingerprint(config, data, code)


def test_settings_that_decide_results_are_guarded(tmp_path: Path) -> None:
    config, mark = frozen(tmp_path)
    first = freeze(config, mark, accept_changes=False)
    assert freeze(*frozen(tmp_path, "--budget.trials", "99", "--cluster.concurrency", "3"), False) == first
    for flags, line in (
        (("--protocol.words", "2"), "protocol.words: 1 -> 2"),
        (("--trial.training.learning-rate", "0.5"), "trial.training.learning_rate: 0.001 -> 0.5"),
        (("--seed", "7"), "seed: 0 -> 7"),
    ):
        with pytest.raises(InputError, match=line):
            freeze(*frozen(tmp_path, *flags), False)
    with pytest.raises(InputError, match="data_digest: d -> other"):
        freeze(*frozen(tmp_path, data="other"), False)
    with pytest.raises(InputError, match="code_digest: c -> newer"):
        freeze(*frozen(tmp_path, code="newer"), False)

    second = freeze(*frozen(tmp_path, code="newer"), True)
    assert second != first
    accepted = yaml.safe_load(config.paths.config.read_text())["accepted"]
    assert accepted == [{"trials_before": first, "changes": ["code_digest: c -> newer"]}]
    assert freeze(*frozen(tmp_path, code="newer"), False) == second, "accepted once, it stays accepted"


def test_differences_name_every_leaf() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}) == [
        "a.c: 2 -> 5",
        "d: 3 -> None",
        "e: None -> 4",
    ]


def test_the_frozen_study_is_read_back_without_its_password(tmp_path: Path) -> None:
    config, mark = frozen(tmp_path, "--storage", "postgresql://me:verysecret@db/optuna")
    freeze(config, mark, accept_changes=False)
    assert "verysecret" not in config.paths.config.read_text()
    again = load_frozen(config.paths)
    assert again.model_copy(update={"storage": None}) == type(again).model_validate(
        config.model_dump(include=set(type(again).model_fields)) | {"storage": None}
    )


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_a_study_goes_on_with_what_it_was_begun_with_by_its_name_alone(preset: str, tmp_path: Path) -> None:
    given = ["--preset", preset, "--data.root", "pairs", "--budget.trials", "7", "--protocol.words", "2", "--seed", "5"]
    config, mark = frozen(tmp_path, *given, "--name", "mine")
    freeze(config, mark, accept_changes=False)
    again, same = frozen(tmp_path, "--name", "mine")
    assert same == mark
    assert again.data.root == Path("pairs").resolve()
    assert again.model_copy(update={"data": config.data}) == config
    freeze(again, same, accept_changes=False)
    assert frozen(tmp_path, "--name", "mine")[0] == again, "for ever"


def test_what_is_given_comes_over_what_a_study_was_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze(*frozen(tmp_path, "--name", "mine", "--budget.trials", "7", "--sampler", "tpe"), accept_changes=False)
    name = ["--name", "mine"]
    file = tmp_path / "more.yaml"
    file.write_text("name: mine\nbudget: {trials: 8}\n")
    assert frozen(tmp_path, "--config", str(file))[0].budget.trials == 8
    assert frozen(tmp_path, "--config", str(file))[0].sampler == "tpe"
    monkeypatch.setenv("PARETOVL_BUDGET__TRIALS", "9")
    assert frozen(tmp_path, "--config", str(file))[0].budget.trials == 9
    assert frozen(tmp_path, *name, "--budget.trials", "10")[0].budget.trials == 10
    monkeypatch.delenv("PARETOVL_BUDGET__TRIALS")
    monkeypatch.setenv("PARETOVL_NAME", "mine")
    monkeypatch.setenv("PARETOVL_STUDIES_DIR", str(tmp_path))
    assert parse([]).budget.trials == 7
    assert parse(["--preset", "quickstart"]).budget.trials == 7
    with pytest.raises(InputError, match="study 'mine' was begun with 'quickstart'"):
        parse(["--preset", "coco_albef"])


def test_a_moved_study_is_found_where_it_is_and_a_renamed_one_is_told(tmp_path: Path) -> None:
    config, mark = frozen(tmp_path / "a", "--name", "mine", "--budget.trials", "7")
    freeze(config, mark, accept_changes=False)
    (tmp_path / "a").rename(tmp_path / "b")
    moved, _ = frozen(tmp_path / "b", "--name", "mine")
    assert (moved.budget.trials, moved.paths.root) == (7, tmp_path / "b" / "mine")
    assert load_frozen(moved.paths).paths == moved.paths
    moved.paths.root.rename(tmp_path / "b" / "yours")
    for read in (
        lambda: frozen(tmp_path / "b", "--name", "yours"),
        lambda: load_frozen(StudyPaths(tmp_path / "b" / "yours")),
    ):
        with pytest.raises(InputError, match="is the folder of study 'mine'"):
            read()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "config: Field required, hash: Field required, fingerprint: Field required"),
        ("config: {name: s}\nha", "is no YAML"),
        ("config: {name: s}\n", "it is cut short, or of another program or version"),
        ("version: 3\nservices: {}\n", "of another program"),
        ("[1]", "not fields with values"),
        ("config: {name: s}\nhash: a\nfingerprint: {}\nlater: 1\n", "later: Extra inputs"),
        ("config: {name: s, warp: 9}\nhash: a\nfingerprint: {}\n", "warp: no such field"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_a_damaged_study_yaml_is_told_by_every_command(content: str | None, told: str, tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path / "s")
    paths.config.parent.mkdir()
    paths.config.mkdir() if content is None else paths.config.write_text(content)
    for read in (lambda: parse(["--name", "s", "--studies-dir", str(tmp_path)]), lambda: load_frozen(paths)):
        with pytest.raises(InputError, match=r"study\.yaml") as refused:
            read()
        assert told in str(refused.value)


def test_a_study_below_home_goes_on_with_what_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PARETOVL_STUDIES_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nstudies_dir: ~/studies\n")
    config = parse(["--config", str(file), "--seed", "7"])
    config.paths.root.mkdir(parents=True)
    freeze(config, fingerprint(config, "d", "c"), False)
    assert parse(["--config", str(file)]).seed == 7
    file.write_text("name: mine\nstudies_dir: $NOT_SET_ANYWHERE\n")
    with pytest.raises(InputError, match=r"studies_dir: the variable \$NOT_SET_ANYWHERE is not set"):
        parse(["--config", str(file)])


def test_folders_that_links_lead_to_are_found_from_anywhere_and_decide_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = freeze(*frozen(tmp_path, "--data.linked-folders", "disk"), False)
    config, mark = frozen(tmp_path, "--data.linked-folders", "elsewhere")
    assert freeze(config, mark, False) == first
    assert load_frozen(config.paths).data.linked_folders == (tmp_path / "elsewhere",)


def test_a_run_says_whether_the_study_is_new_and_what_changed(tmp_path: Path) -> None:
    config, mark = frozen(tmp_path, "--name", "mine")
    freeze(config, mark, accept_changes=False)
    first = read_frozen(config.paths)
    assert opening_line("mine", None, first) == "study mine is new, with the preset quickstart"
    assert opening_line("mine", first, first) == "study mine goes on with what it was begun with"
    freeze(*frozen(tmp_path, "--name", "mine", "--budget.trials", "99"), accept_changes=False)
    assert opening_line("mine", first, read_frozen(config.paths)).splitlines() == [
        "study mine goes on with what it was begun with, but for",
        "  budget.trials: 12 -> 99",
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"cache_dir": "/nvme"}, None),  # one machine
        ({"cluster": {"address": "auto"}}, None),  # all nodes see studies_dir, and the cache in it
        ({"cluster": {"address": "auto"}, "cache_dir": "/nvme"}, "studies/.shared"),
    ],
)
def test_nodes_with_disks_of_their_own_share_what_they_prepare(fields: dict[str, Any], expected: str | None) -> None:
    config = StudyConfig(**fields)
    assert config.shared_cache == expected
    template = trial_template(config)
    assert template.shared_cache == (None if expected is None else str(Path(expected).resolve()))
