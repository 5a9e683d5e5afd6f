"""What can be known of a study before anything runs: every mistake is a row, and they are told together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from study.arguments import parse
from study.config import StudyConfig
from trainables.cli.yaml_core import dump
from trainables.config import AttackConfig, Protocol, TrialConfig
from trainables.errors import InputError

COST = {"metric": "cost/device_seconds"}
RECALL = {"metric": "clean/mr_r1"}


def told(folder: Path, fields: dict[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(dump(fields))
    with pytest.raises(InputError) as error:
        parse(["--config", str(path)])
    return str(error.value)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "cost without direction": ({"objectives": [COST]}, "a cost needs its direction and range, such as {metric: cost/"),
    "cost without range": ({"objectives": [{**COST, "direction": "minimize"}]}, "low: 0, high: 300}"),
    "cost to maximize": (
        {"objectives": [{**COST, "direction": "maximize", "low": 0, "high": 9}]},
        "a cost is to minimize",
    ),
    "endless cost": (
        {"objectives": [{**COST, "direction": "minimize", "low": 0, "high": float("inf")}]},
        "both finite",
    ),
    "recall in percent": ({"objectives": [{**RECALL, "high": 100}]}, "recalls are in [0, 1]"),
    "one objective twice": ({"objectives": [RECALL, RECALL]}, "clean/mr_r1 is given twice"),
    "bound in percent": ({"constraints": [{**RECALL, "at_least": 50}]}, "recalls are in [0, 1], and 50.0 is not"),
    "bound of no cost": ({"constraints": [{**COST, "at_most": 0}]}, "no trial costs 0.0"),
    "one recipe twice": ({"recipes": ["mat", "fare", "mat"]}, "recipes: 'mat' is given twice"),
    "warm start from itself": ({"name": "me", "warm_start": ["other", "me"]}, "me is this study itself"),
    "warm start from elsewhere": ({"warm_start": ["../other"]}, "warm_start.0: use letters a-z"),
    "price of another device": (
        {"budget": {"money": 3}, "price": {"device_hour": {"l4": 1}, "device": "a100"}},
        "money needs the price of a100; price.device_hour has l4",
    ),
    "batch for the workers": (
        {"trial": {"training": {"batch_size": 6}, "workers": {"count": 4}}},
        "trial: training.batch_size 6 is no multiple of workers.count 4\n",
    ),
    "more workers than images": (
        {"data": {"max_train_images": 3}, "trial": {"training": {"batch_size": 8}, "workers": {"count": 8}}},
        "workers.count 8 is more than the training images, 3",
    ),
    "epoch below a batch": (
        {"trial": {"training": {"epoch_images": 8, "batch_size": 16}}},
        "epoch_images 8 is less than one batch of 16",
    ),
    "heads": ({"trial": {"model": {"tiny": {"heads": 5}}}}, "width 64 is no multiple of heads 5"),
    "patches": (
        {"data": {"image_pixels": 16}, "trial": {"model": {"tiny": {"patch_pixels": 32}}}},
        "patch_pixels 32 is more than data.image_pixels 16",
    ),
    "rerank without fusion": ({"protocol": {"rerank": 10}}, "trial: protocol.rerank: a clip has no fusion transformer"),
    "attack on matching": (
        {"protocol": {"attacks": ["image", "both", "itm"]}},
        "protocol.attacks, itm: a clip has no fusion transformer",
    ),
    "negative seed": ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
    "large seed": ({"seed": 2**64}, "seed: Input should be less than 4294967296"),
    "name": ({"name": "étude"}, "name: use letters a-z"),
    "nothing to maximize": ({"objectives": []}, "objectives: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str, tmp_path: Path) -> None:
    fields, message = MISTAKES[name]
    assert message in told(tmp_path, fields)


def test_mistakes_are_told_together(tmp_path: Path) -> None:
    names = (
        "cost without direction",
        "bound in percent",
        "one recipe twice",
        "large seed",
        "name",
        "batch for the workers",
    )
    fields = {field: value for name in names for field, value in MISTAKES[name][0].items()}
    message = told(tmp_path, fields)
    for name in names:
        assert MISTAKES[name][1].removeprefix("recipes: ").strip() in message


WRONG_ITEM: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": ({"recipes": ["foo", "mat", "mat"]}, "recipes: 'mat' is given twice"),
    "objective": ({"objectives": [COST, {"metric": "nope/mr_r5"}]}, "objectives: no metric nope/mr_r5"),
    "constraint": (
        {"constraints": [{**RECALL, "at_least": 50}, {"metric": "clean/mr_r7", "at_least": 0.5}]},
        "constraints: no metric clean/mr_r7",
    ),
    "protocol": ({"protocol": {"seed": -1}, "objectives": [{"metric": "nope/mr_r5"}]}, "no metric nope/mr_r5"),
    "budget": ({"budget": {"money": 3, "trials": -1}}, "budget: money needs price.device_hour"),
    "warm start": ({"name": "me", "warm_start": ["../a", "me"]}, "warm_start: me is this study itself"),
}


@pytest.mark.parametrize("name", WRONG_ITEM)
def test_a_wrong_item_hides_no_mistake_of_the_others(name: str, tmp_path: Path) -> None:
    fields, message = WRONG_ITEM[name]
    _, first, *_, last, _ = told(tmp_path, fields).splitlines()
    assert message not in first
    assert message in last


@pytest.mark.parametrize(
    "fields",
    [
        {"protocol": {"recall_at": [7, 3]}, "objectives": [{"metric": "clean/mr_r7"}]},
        {"space": {"words": {"kind": "int", "low": 2, "high": 1}}, "points": [{"words": 2}]},
        {"price": {"device_hour": {"l4": -1}}, "budget": {"money": 3}},
    ],
)
def test_what_depends_on_a_mistake_is_not_told(fields: dict[str, Any], tmp_path: Path) -> None:
    assert told(tmp_path, fields).startswith("a mistake")


POINTS: dict[str, tuple[dict[str, Any], str]] = {
    "radius without steps": ({"epsilon": 0.1}, "epsilon > 0 needs attack_steps >= 1"),
    "steps without radius": ({"attack_steps": 2}, "attack_steps > 0 needs epsilon > 0"),
    "ramp the wrong way": ({"ramp_begin": 0.5, "ramp_end": 0.2}, "ramp_end is before ramp_begin"),
    "start of no ramp": ({"epsilon_start": 0.1, "epsilon": 0.2, "attack_steps": 1}, "with ramp_end 0 there is none"),
    "crossed and consistent": ({"pairs": "crossed", "companion": "consistency"}, "pairs crossed says nothing"),
    "matching of a clip": ({"companion": "matching", "contrastive_weight": 0.5}, "a clip has no fusion transformer"),
    "fusion of a clip": ({"trainable": "fusion", "contrastive_weight": 0.5}, "trainable fusion: a clip has no"),
    "fusion unused": ({"trainable": "fusion"}, "nothing would be trained"),
    "fusion beside the anchor": (
        {"trainable": "fusion", "contrastive_weight": 0.5, "companion": "anchor"},
        "nothing would be trained",
    ),
    "text of the anchor": ({"trainable": "text", "contrastive_weight": 0.0}, "nothing would be trained"),
    "text of a named anchor": (
        {"trainable": "text", "contrastive_weight": 0.0, "companion": "anchor"},
        "nothing would be trained",
    ),
}


@pytest.mark.parametrize("name", POINTS)
def test_a_point_alone_is_held_against_its_family(name: str) -> None:
    point, message = POINTS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        TrialConfig.model_validate({"point": point})


def test_what_only_the_base_can_say_is_left_to_it() -> None:
    point = {"companion": "matching", "contrastive_weight": 0.5}
    assert TrialConfig.model_validate({"point": point, "model": {"base": "some/model"}}).model.known_family is None
    assert StudyConfig.model_validate({"protocol": {"rerank": 9}, "trial": {"model": {"base": "a/b"}}}).protocol.rerank


def test_text_is_trained_through_matching_and_the_contrastive_loss() -> None:
    for family, weight in (("albef", 0.0), ("clip", 0.5), ("blip", 1.0)):
        point = {"trainable": "text", "contrastive_weight": weight}
        assert TrialConfig.model_validate({"point": point, "model": {"family": family}})


def test_attacks_in_one_text() -> None:
    assert [attack.name for attack in Protocol.model_validate({"attacks": "image, both"}).attacks] == ["image", "both"]
    assert AttackConfig.model_validate({"name": "SGA_1", "attack": "sga"}).name == "SGA_1"
