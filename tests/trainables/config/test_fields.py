"""Values as people write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from pydantic import BaseModel, ValidationError

from study.config import StudyConfig
from study.ledger.trials import replicate_key, trial_key
from trainables.config import AttackConfig, Protocol, TrialConfig
from trainables.config.fields import LONGEST_NAME, SEEDS, expanded, expanded_url
from trainables.evaluate import Arguments


def told(schema: type[BaseModel], **fields: Any) -> str:
    with pytest.raises(ValidationError) as error:
        schema.model_validate(fields)
    return str(error.value)


NO_NAMES = ["étude", "", ".hidden", "../up", "a/b", "a b", "-a", "naïve", "研究", "a\n", "a" * (LONGEST_NAME + 1)]


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize(
    ("schema", "field", "fields"),
    [
        (StudyConfig, "name", {}),
        (TrialConfig, "key", {}),
        (AttackConfig, "name", {"attack": "image"}),
        (StudyConfig, "warm_start", {}),
    ],
)
def test_all_names_are_of_one_kind(schema: type[BaseModel], field: str, fields: dict[str, str], name: str) -> None:
    if field == "key" and len(name) > LONGEST_NAME:
        name *= 2
    given = (name,) if field == "warm_start" else name
    assert field in told(schema, **fields, **{field: given})


@pytest.mark.parametrize("name", ["a", "Study_1.b-c", "2026", "a" * LONGEST_NAME])
def test_every_trial_of_a_study_whose_name_is_accepted_has_a_key_that_is(name: str) -> None:
    assert StudyConfig.model_validate({"name": name}).name == name
    for key in (trial_key(name, 0), replicate_key(trial_key(name, 9_999_999), 20)):
        assert TrialConfig.model_validate({"key": key}).key == key
    assert AttackConfig.model_validate({"name": name, "attack": "image"}).name == name


def test_the_longest_names_fit_everywhere(tmp_path: Path) -> None:
    key = replicate_key(trial_key("a" * LONGEST_NAME, 9_999_999), 20)
    (tmp_path / f".{key}-search.manifest.json.1234567.part").write_text("")
    metric = f"rung/{'a' * LONGEST_NAME}.float.itm/mr_r1000.high"
    assert max(len(key), len(metric), len(f"paretovl/{key}")) <= 250  # MLflow's keys and run names


@pytest.mark.parametrize("name", ["clean", "cost", "rung", "train", "both.float", "image.itm"])
def test_attacks_are_not_called_what_other_metrics_are(name: str) -> None:
    assert "have a meaning already" in told(AttackConfig, name=name, attack="image")


@pytest.mark.parametrize("seed", [-1, SEEDS, 2**64])
@pytest.mark.parametrize(
    ("schema", "path"),
    [
        (StudyConfig, "seed"),
        (StudyConfig, "protocol.seed"),
        (StudyConfig, "data.shapes.seed"),
        (StudyConfig, "trial.model.pretrain.seed"),
        (TrialConfig, "seed"),
        (Protocol, "seed"),
        (Arguments, "seed"),
    ],
)
def test_seeds_that_a_worker_would_refuse(schema: type[BaseModel], path: str, seed: int) -> None:
    value: Any = seed
    for part in reversed(path.split(".")):
        value = {part: value}
    assert path in told(schema, **value)


def test_every_generator_takes_the_largest_seed() -> None:
    np.random.default_rng([SEEDS - 1, 3])
    np.random.RandomState(SEEDS - 1)
    optuna.samplers.QMCSampler(seed=SEEDS - 1, scramble=True)
    torch.manual_seed(((SEEDS - 1) * 1_000_003 + 10**9) * 1024 + 1023)


def test_home_and_variables_are_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    study = StudyConfig.model_validate(
        {
            "studies_dir": "~/studies",
            "data": {"root": "$SCRATCH/coco", "generated_captions": "${SCRATCH}/captions.json"},
            "trial": {"model": {"base": "~/clip", "masked_lm": "$SCRATCH/bert", "pretrain": {"root": "~/pairs"}}},
            "protocol": {"attacks": ["both", "~/mine.py:Mine"]},
            "storage": "sqlite:///~/study.db",
            "tracking": {"uri": "~/mlruns"},
        }
    )
    model = study.trial.model
    assert study.studies_dir == tmp_path / "studies"
    assert (study.data.root, study.data.generated_captions) == (
        Path("/scratch/me/coco"),
        Path("/scratch/me/captions.json"),
    )
    assert (model.base, model.masked_lm, model.pretrain.root) == (
        f"{tmp_path}/clip",
        "/scratch/me/bert",
        tmp_path / "pairs",
    )
    assert study.protocol.attacks[1].file == tmp_path / "mine.py"
    assert study.storage == f"sqlite:///{tmp_path}/study.db"
    assert study.tracking.uri == f"{tmp_path}/mlruns"
    towers = {"image_tower": "~/vit", "text_tower": "$SCRATCH/bert"}
    trial = TrialConfig.model_validate({"cache_dir": "~/c", "storage_path": "$SCRATCH/runs", "model": towers})
    assert (trial.cache_dir, trial.storage_path) == (tmp_path / "c", "/scratch/me/runs")
    assert (trial.model.image_tower, trial.model.text_tower) == (f"{tmp_path}/vit", "/scratch/me/bert")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "is empty"),
        ("$NOT_SET_ANYWHERE/coco", "$NOT_SET_ANYWHERE is not set"),
        ("${NOT_SET_ANYWHERE}", "${NOT_SET_ANYWHERE} is not set"),
        ("~nobody-of-that-name/coco", "no home of ~nobody-of-that-name"),
    ],
)
def test_paths_that_cannot_be_expanded_are_refused(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        expanded(value)


def test_passwords_are_left_alone() -> None:
    assert expanded_url("postgresql://me:pa$word@db/x") == "postgresql://me:pa$word@db/x"
    assert expanded_url("s3://bucket/$x") == "s3://bucket/$x"
