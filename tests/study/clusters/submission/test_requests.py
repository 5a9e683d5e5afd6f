"""What is asked of a cluster, and what is refused before there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from study.clusters.submission.requests import described
from trainables.errors import InputError

FILE: dict[str, Any] = {
    "head_start_ray_commands": [
        "/home/me/venv/bin/ray stop",
        "ulimit -n 65536; RAY_AUTH_MODE=token PARETOVL_STUDIES_DIR=/mnt/studies PARETOVL_CACHE_DIR=/mnt/cache "
        "/home/me/venv/bin/ray start --head",
    ]
}
SHARED = ["--studies-dir", "/mnt/studies"]


def mistakes(flags: list[str], own: dict[str, str] | None = None, cluster: dict[str, Any] | None = None) -> str:
    with pytest.raises(InputError) as told:
        described(flags, None, own or {}, cluster)
    return str(told.value)


def test_what_the_file_says_is_supplied_and_what_is_typed_wins() -> None:
    asked = described(["--preset", "coco_clip_b16", "--data.root", "/mnt/coco"], None, {}, FILE)
    assert (asked.name, asked.studies_dir, asked.python) == (
        "coco_clip_b16",
        "/mnt/studies",
        "/home/me/venv/bin/python",
    )
    assert asked.entrypoint == (
        "[ ! -f ~/.paretovl-coco_clip_b16.env ] || { set -a; . ~/.paretovl-coco_clip_b16.env; set +a; "
        "rm ~/.paretovl-coco_clip_b16.env; }; exec env PARETOVL_CACHE_DIR=/mnt/cache PARETOVL_CLUSTER__ADDRESS=auto "
        "PARETOVL_STUDIES_DIR=/mnt/studies /home/me/venv/bin/python -m study.run --preset coco_clip_b16 "
        "--data.root /mnt/coco"
    )
    assert described(["--studies-dir", "/other"], None, {}, FILE).studies_dir == "/other"
    own = {"PARETOVL_STUDIES_DIR": "/third", "PARETOVL_TEST_DATA": "here", "HOME": "/home/you"}
    typed = described([], None, own, FILE)
    assert typed.studies_dir == "/third"
    assert "HOME" not in typed.entrypoint
    assert "TEST_DATA" not in typed.entrypoint


def test_variables_here_are_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOVL_BUDGET__TRIALS", "99")
    before = dict(os.environ)
    assert "TRIALS" not in described(SHARED, None, {}, None).entrypoint, "those that are given count, and no others"
    assert dict(os.environ) == before
    mistakes(["--budget.trials", "many"])
    assert dict(os.environ) == before


def test_all_mistakes_are_told_here() -> None:
    told = mistakes(["--early-stopping.eta", "1", "--protocol.epsilon", "2", *SHARED])
    assert "early_stopping.eta" in told
    assert "protocol.epsilon" in told
    assert "early_stopping.eta" in mistakes(SHARED, {"PARETOVL_EARLY_STOPPING__ETA": "1"})


def test_paths_of_this_machine_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = mistakes(["--data.root", "coco", "--trial.model.base", "./clip", "--data.linked-folders", '["/a","b"]'])
    for line in (
        "studies_dir: studies is",
        "data.root: coco is",
        "trial.model.base: clip is",
        "data.linked_folders.1: b",
    ):
        assert line in told
    assert "linked_folders.0" not in told
    attacks = '[{"name": "mine", "attack": "my_attack.py:Blackout"}, "both", "image"]'
    assert "protocol.attacks.0: my_attack.py is" in mistakes(["--protocol.attacks", attacks, *SHARED])
    described(["--trial.model.base", "openai/clip-vit-base-patch16", *SHARED], None, {}, None)


def test_the_study_there_is_not_looked_for_here(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "study.yaml").write_text("of another study")
    described(["--studies-dir", str(tmp_path)], None, {}, None)


PASSWORD = {"PARETOVL_STORAGE": "postgresql+psycopg://me:hush@db/x"}


def test_passwords_are_in_nothing_that_is_shown(tmp_path: Path) -> None:
    asked = described([], None, PASSWORD, FILE)
    assert asked.secrets == PASSWORD
    assert "hush" not in asked.entrypoint
    assert "STORAGE" not in asked.entrypoint
    assert asked.secrets_file == "~/.paretovl-quickstart.env"
    assert "over HTTP" in mistakes(SHARED, PASSWORD)
    config = tmp_path / "my.yaml"
    config.write_text(f"storage: {PASSWORD['PARETOVL_STORAGE']}\n")
    with pytest.raises(InputError, match="holds a password"):
        described([], config, {}, FILE)


def test_a_file_with_fields_goes_along(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("name: mine\nbudget: {trials: 5}\n")
    asked = described(SHARED, config, {}, None)
    assert asked.name == "mine"
    assert asked.entrypoint.endswith(
        "--config /dev/stdin <<'END_OF_CONFIG'\nname: mine\nbudget: {trials: 5}\nEND_OF_CONFIG"
    )
    config.write_text("budget: {trails: 5}\n")
    with pytest.raises(InputError, match=r"did you mean budget\.trials"):
        described(SHARED, config, {}, None)
