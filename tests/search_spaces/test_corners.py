"""Whatever a space may draw is a trial, or the space is refused."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from search_spaces.joint import FUSION, JOINT
from search_spaces.space import Knob, check_space, corners, params_of, suggest, typed_space
from study.config import StudyConfig
from trainables.config import Point, TrialConfig

optuna.logging.set_verbosity(optuna.logging.WARNING)

FLOATS = ("contrastive_weight", "temperature", "epsilon", "epsilon_start", "ramp_begin", "ramp_end", "distillation")
INTEGERS = ("attack_steps", "words", "captions_per_image")
WORDS = {
    "companion": ["auto", "anchor", "matching", "consistency"],
    "pairs": ["adversarial", "crossed"],
    "trainable": ["all", "image", "text", "fusion"],
    "attack_objective": ["cross", "deviation"],
    "text_search": ["importance", "exact"],
}
ENDS = st.sampled_from([0.0, 0.01, 0.2, 0.5, 1.0]) | st.floats(0, 1)


@st.composite
def knobs(draw: st.DrawFn, name: str, earlier: list[str]) -> Knob:
    conditions: dict[str, Any] = {}
    if earlier and draw(st.booleans()):
        conditions[draw(st.sampled_from(["above_zero", "below_one"]))] = draw(st.sampled_from(earlier))
    if name == "attack_steps" and "epsilon" in earlier:
        conditions = draw(st.sampled_from([conditions, {"above_zero": "epsilon"}, {"above_zero": "epsilon"}]))
    if name in FLOATS and draw(st.booleans()):
        low, high = sorted((draw(ENDS), draw(ENDS)))
        return Knob(kind="float", low=low, high=high, log=low > 0 and draw(st.booleans()), **conditions)
    if name in INTEGERS and draw(st.booleans()):
        low, high = sorted((draw(st.integers(0, 10)), draw(st.integers(0, 10))))
        return Knob(kind="int", low=low, high=high, **conditions)
    values: Any = st.booleans() if name == "temperature_learned" else ENDS
    values = st.integers(0, 10) if name in INTEGERS else values
    values = st.sampled_from(WORDS[name]) if name in WORDS else values
    return Knob(kind="choice", choices=tuple(draw(st.lists(values, min_size=1, max_size=4, unique=True))), **conditions)


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, Knob]:
    known = st.sampled_from([*FLOATS, *INTEGERS, *WORDS, "temperature_learned"])
    names = draw(st.lists(known, min_size=1, max_size=4, unique=True))
    space: dict[str, Knob] = {}
    for name in sorted(names, key=lambda name: name == "attack_steps"):
        space[name] = draw(knobs(name, [other for other in space if other not in WORDS]))
    return space


FAMILIES = st.sampled_from([{"family": "albef"}, {"family": "clip"}, {"image_tower": "vit"}])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spaces(), FAMILIES, st.integers(0, 2**32 - 1))
def test_every_draw_of_a_space_that_is_accepted_is_a_trial(
    space: dict[str, Knob], model: dict[str, str], seed: int
) -> None:
    try:
        config = StudyConfig.model_validate({"space": space, "trial": {"model": model}})
    except ValidationError:
        return
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(20):
        params = suggest(config.space, study.ask())
        trial = TrialConfig.model_validate({"point": params, "model": model})
        assert params_of(config.space, trial.point) == params


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spaces())
def test_what_a_space_is_refused_for_can_be_drawn(space: dict[str, Knob]) -> None:
    for params in corners(typed_space(space)) if not check_space(space) else ():
        Point.model_validate(params)
        assert all(space[name].contains(value) for name, value in params.items())


def test_the_own_spaces_can_be_used_with_their_families() -> None:
    for space, family in ((JOINT, "clip"), (JOINT, "blip"), (FUSION, "albef")):
        assert StudyConfig.model_validate({"space": space, "trial": {"model": {"family": family}}}).space == space
    drawn = list(corners(FUSION))
    assert {"trainable": "fusion", "contrastive_weight": 1.0}.items() not in [params.items() for params in drawn]
    assert any(params["contrastive_weight"] == 1 and "trainable" not in params for params in drawn)
    assert any(params["contrastive_weight"] == 0 and params.get("trainable") == "fusion" for params in drawn)


def test_a_recipe_that_differs_where_a_knob_does_not_exist_is_outside() -> None:
    inside = Point(contrastive_weight=1.0, temperature=0.05)
    params = params_of(FUSION, inside)
    assert params is not None
    assert "trainable" not in params
    assert params_of(FUSION, Point(contrastive_weight=1.0, temperature=0.05, trainable="image")) is None


RADIUS = {"kind": "float", "low": 0, "high": "8/255"}
STEPS = {"kind": "choice", "choices": [2, 10], "above_zero": "epsilon"}
WEIGHT = {"kind": "float", "low": 0, "high": 1}
FUSED = {"kind": "choice", "choices": ["all", "fusion"]}
RAMP = {"kind": "float", "low": 0.1, "high": 0.5}


def integer(low: int, high: int, **conditions: str) -> dict[str, Any]:
    return {"kind": "int", "low": low, "high": high, **conditions}


def choice(*choices: Any, **conditions: str) -> dict[str, Any]:
    return {"kind": "choice", "choices": choices, **conditions}


CONSISTENT = {"companion": choice("consistency"), "pairs": choice("adversarial", "crossed")}


@pytest.mark.parametrize(
    ("family", "space", "told"),
    [
        ("clip", {"epsilon": RADIUS}, "a radius needs steps; add attack_steps"),
        ("clip", {"attack_steps": integer(1, 3)}, "attack_steps > 0 needs epsilon > 0"),
        ("clip", {"epsilon": RADIUS, "attack_steps": integer(1, 3)}, "needs above_zero: epsilon"),
        ("clip", {"epsilon": RADIUS, "attack_steps": choice(0, 2, above_zero="epsilon")}, "epsilon > 0 needs attack"),
        ("clip", {"epsilon": RADIUS, "attack_steps": integer(0, 3, above_zero="epsilon")}, "epsilon > 0 needs attack"),
        ("clip", {"attack_steps": {"kind": "float", "low": 1, "high": 3}}, "space.attack_steps: 1.764 is out of range"),
        ("clip", {"ramp_begin": RAMP}, "ramp_end is before ramp_begin (for example at ramp_begin"),
        ("clip", {"ramp_begin": RAMP, "ramp_end": RAMP}, "ramp_end is before ramp_begin (for example at ramp_begin 0."),
        ("clip", {"epsilon_start": RADIUS}, "with ramp_end 0 there is none"),
        ("albef", {"contrastive_weight": WEIGHT, "trainable": FUSED}, "nothing would be trained"),
        ("albef", {"trainable": FUSED}, "nothing would be trained"),
        ("clip", {"contrastive_weight": choice(0.5), "trainable": FUSED}, "a clip has no fusion transformer"),
        ("clip", {"contrastive_weight": WEIGHT, "trainable": choice("all", "text")}, "nothing would be trained"),
        ("clip", {"companion": choice("anchor", "matching")}, "to match pairs with"),
        ("clip", CONSISTENT, "pairs crossed says nothing"),
        ("clip", {"temperature": choice("warm")}, "'warm' is out of range"),
        ("clip", {"epsilon": choice("2/255", 2 / 255), "attack_steps": STEPS}, "the same value"),
        ("albef", {"trainable": FUSED, "words": integer(0, 1, above_zero="trainable")}, "no earlier knob with numbers"),
        ("clip", {"words": integer(0, 1, below_one="contrastive_weight")}, "no earlier knob"),
    ],
)
def test_spaces_with_a_draw_that_is_no_trial_are_refused(family: str, space: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as error:
        StudyConfig.model_validate({"space": space, "trial": {"model": {"family": family}}})
    assert told in str(error.value)


def test_choices_and_points_are_of_the_kind_of_their_field() -> None:
    space = {
        "epsilon": {"kind": "choice", "choices": [0, "1/255", "1e-1"]},
        "attack_steps": {"kind": "choice", "choices": ["2", 10.0], "above_zero": "epsilon"},
        "temperature_learned": {"kind": "choice", "choices": ["true", "false"]},
    }
    point = {"epsilon": "1e-1", "attack_steps": "2", "temperature_learned": "true"}
    config = StudyConfig.model_validate({"space": space, "points": [point]})
    assert config.space["epsilon"].choices == (0.0, 1 / 255, 0.1)
    assert [type(choice) for choice in config.space["attack_steps"].choices or ()] == [int, int]
    assert config.space["temperature_learned"].choices == (True, False)
    assert config.points == ({"epsilon": 0.1, "attack_steps": 2, "temperature_learned": True},)
    assert StudyConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([{"epsilon": 0, "attack_steps": 2}], "attack_steps does not exist at epsilon 0"),
        ([{"epsilon": "1/2", "attack_steps": 2}], "epsilon=0.5 is not in the space"),
        ([{"words": "many"}], "words='many' is not in the space"),
        ([{"tau": 1}], "tau is not in the space, whose knobs are contrastive_weight"),
        ([{"words": 1}, {"words": 1.0}], "is given twice"),
    ],
)
def test_given_points_that_cannot_be_run_are_refused(points: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ValidationError) as error:
        StudyConfig.model_validate({"points": points})
    assert told in str(error.value)
