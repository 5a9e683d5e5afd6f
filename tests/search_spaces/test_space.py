"""The joint space and the recipes in it."""

from __future__ import annotations

import optuna
import pytest
from pydantic import ValidationError

from search_spaces.joint import JOINT
from search_spaces.recipes import Recipe, recipe_point
from search_spaces.space import Knob, check_space, params_of, suggest
from trainables.config import Point

optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_every_draw_is_a_point_and_steps_need_a_radius() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial({"contrastive_weight": 1.0, "temperature": 0.05, "epsilon": 0.0, "words": 0})
    drawn = [suggest(JOINT, study.ask()) for _ in range(50)]
    assert "attack_steps" not in drawn[0]
    assert all("attack_steps" in params for params in drawn[1:])
    for params in drawn:
        point = Point.model_validate(params)
        assert params_of(JOINT, point) == params


def test_recipes_have_the_published_settings() -> None:
    epsilon = 2 / 255
    names: tuple[Recipe, ...] = ("tecoa_itr", "fare", "mat")
    tecoa, fare, mat = (recipe_point(name, epsilon, 0.05) for name in names)
    assert recipe_point("finetune", epsilon, 0.05) == Point(temperature=0.05)
    assert (tecoa.contrastive_weight, tecoa.epsilon, tecoa.attack_steps, tecoa.words) == (1, epsilon, 10, 0)
    assert (fare.contrastive_weight, fare.attack_steps, fare.trainable, fare.attack_objective) == (
        0,
        10,
        "image",
        "deviation",
    )
    assert (mat.contrastive_weight, mat.epsilon, mat.attack_steps, mat.words) == (1, epsilon, 2, 1)
    assert params_of(JOINT, fare) is None  # the sampler must not take it for one of its points
    assert all(params_of(JOINT, point) for point in (tecoa, mat, recipe_point("finetune", epsilon, 0.05)))


def test_mistakes_in_a_space_are_told_together() -> None:
    space = {
        "epsilon": Knob(kind="float", low=0, high=2),
        "attack_steps": Knob(kind="int", low=1, high=10),
        "tempo": Knob(kind="float", low=0, high=1),
        "words": Knob(kind="choice", choices=(0, 99), above_zero="nothing"),
    }
    told = "\n".join(check_space(space))
    for part in ("space.tempo", "above_zero: epsilon", "space.words.above_zero", "99 is out of range"):
        assert part in told
    assert check_space(JOINT) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "float", "low": 1, "high": 0},
        {"kind": "float", "low": 0, "high": 1, "log": True},
        {"kind": "choice"},
        {"kind": "choice", "choices": (1, 1)},
        {"kind": "int", "low": 0.5, "high": 2},
    ],
)
def test_knobs_that_make_no_sense(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Knob.model_validate(fields)
