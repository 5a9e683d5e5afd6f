"""A model that training left as it was is told from one that it changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainables.config import Point, TrialConfig
from trainables.prepare import prepare
from trainables.results import TrialResult
from trainables.training.finetune import finetune

ATTACKED = {"epsilon": 2 / 255, "attack_steps": 1}


def result_of(trial: TrialConfig, folder: Path, learning_rate: float = 1e-3, **point: Any) -> TrialResult:
    training = trial.training.model_copy(update={"learning_rate": learning_rate})
    config = trial.model_copy(update={"point": Point(**point), "training": training})
    finetune(config, prepare(config), torch.device("cpu"), None, folder, lambda metrics, checkpoint: None)
    return TrialResult.model_validate_json(next(folder.glob("*/result.json")).read_text())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"contrastive_weight": 0}, "is 0 without an attack on images"),
        ({"contrastive_weight": 0, "words": 2}, "is 0 without an attack on images"),
        ({"contrastive_weight": 0, **ATTACKED}, None),
        ({"contrastive_weight": 0.1}, None),
        ({"contrastive_weight": 0, "companion": "consistency"}, "16 steps moved its weights by "),
        ({"contrastive_weight": 0, "companion": "consistency", **ATTACKED}, None),
        ({"learning_rate": 1e-9}, "16 steps moved its weights by 2e-08 of their norm"),
        ({"trainable": "text"}, None),
    ],
)
def test_what_had_no_effect(tiny_trial: TrialConfig, tmp_path: Path, changes: dict[str, Any], told: str | None) -> None:
    result = result_of(tiny_trial, tmp_path, **changes)
    if told is None:
        assert result.untouched is None
    else:
        assert result.untouched is not None
        assert told in result.untouched
    assert sum(result.captions_per_image) == result.queries["ir"]
    assert len(result.captions_per_image) == result.queries["tr"]
    assert np.min(result.captions_per_image) > 0
