"""What a trial names is looked for before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainables import trial
from trainables.cli.yaml_core import dump
from trainables.config import ModelConfig
from trainables.execution.places import family_in


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"protocol": {"attacks": ["imgae"]}}, ["no attack 'imgae'"]),
        ({"model": {"image_tower": "./vit"}}, ["model.image_tower: there is no ", "/vit; give a hub id"]),
        ({"model": {"masked_lm": "models/bert/base"}}, ["model.masked_lm: there is no models/bert/base"]),
        ({"model": {"base": "CLIP.safetensors"}}, ["model.base: there is no ", "CLIP.safetensors"]),
        (
            {"data": {"root": "nowhere"}, "protocol": {"attacks": ["a", "b"]}},
            ["attack 'a'", "attack 'b'", "nowhere"],
        ),
        ({"model": {"base": "clip"}, "protocol": {"rerank": 3}}, ["protocol.rerank: a clip has no fusion transformer"]),
        ({"model": {"base": "clip"}, "point": {"companion": "matching"}}, ["companion matching: a clip has no fusion"]),
        ({"key": "étude", "seed": -1}, ["key: use letters", "seed: "]),
    ],
)
def test_a_trial_alone_is_checked_before_ray_starts(
    fields: dict[str, Any],
    told: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    shapes = {"train_images": 8, "val_images": 8, "test_images": 8}
    data = {"image_pixels": 16, "shapes": shapes, **fields.pop("data", {})}
    (tmp_path / "trial.yaml").write_text(dump({**fields, "data": data}), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        trial.main(["trial.yaml"])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1
    for part in told:
        assert part in message


def test_the_family_is_read_from_the_base_only_where_nothing_else_says_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    assert family_in(ModelConfig(base=str(tmp_path))) == "blip"
    assert family_in(ModelConfig(base="no/model", family="albef")) == "albef"
    assert family_in(ModelConfig(image_tower="no/model")) == "dual"
    assert family_in(ModelConfig()) == "clip"
