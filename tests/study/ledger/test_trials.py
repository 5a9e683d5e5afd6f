"""What all trials of a study share."""

from __future__ import annotations

import pytest

from search_spaces.space import Knob
from study.config import StudyConfig
from study.ledger.trials import trial_template

WEIGHT = Knob(kind="float", low=0, high=1)


@pytest.mark.parametrize(
    ("recipes", "space", "words"),
    [
        (("finetune", "fare"), {"contrastive_weight": WEIGHT}, 0),
        (("finetune", "mat"), {"contrastive_weight": WEIGHT}, 1),
        (("finetune",), {"words": Knob(kind="choice", choices=(0, 1))}, 1),
        (("finetune",), {"text_augmentation": Knob(kind="choice", choices=("none", "eda"))}, 1),
    ],
)
def test_the_template_changes_words_if_any_trial_does(
    recipes: tuple[str, ...], space: dict[str, Knob], words: int
) -> None:
    """So captions whose words cannot be told apart are refused before the first trial, not by every one."""
    config = StudyConfig.model_validate({"recipes": recipes, "space": space})
    assert trial_template(config).point.words == words
