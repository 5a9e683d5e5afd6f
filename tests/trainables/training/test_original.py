"""What the anchor and the attack by deviation keep to: the untrained model's view of what is trained on."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainables.models.test_families import FAMILIES
from trainables.config import Point, TrialConfig
from trainables.prepare import prepare
from trainables.training.attack import attack_pairs
from trainables.training.clock import Clock
from trainables.training.feed import Feed
from trainables.training.objective import Trainee
from trainables.training.original import Original, frozen_image_side
from trainables.training.step import worker_loss

CPU = torch.device("cpu")


@pytest.mark.parametrize("augmentation", ["none", "crop"])
def test_the_original_sees_the_images_that_are_trained_on(
    tiny_trial: TrialConfig, monkeypatch: pytest.MonkeyPatch, augmentation: str
) -> None:
    point = Point(
        contrastive_weight=0.0,
        attack_objective="deviation",
        epsilon=1e-9,
        attack_steps=1,
        image_augmentation=augmentation,
    )
    config = tiny_trial.model_copy(update={"point": point})
    prepared = prepare(config)
    seen: dict[str, Any] = {}

    def recorded(model: Any, config: Any, pixels: Any, *others: Any, **named: Any) -> Any:
        seen.update(pixels=pixels, original=named["original"])
        return attack_pairs(model, config, pixels, *others, **named)

    monkeypatch.setattr("trainables.training.step.attack_pairs", recorded)
    original = Original(prepared, CPU, cropped=augmentation == "crop")
    before = copy.deepcopy(prepared.base)
    trainee = Trainee(prepared.base, point)
    one, two = Feed(config, prepared, CPU).batches(0, 2)
    loss = worker_loss(trainee, trainee, config, original, one, 0, 16, Clock(CPU))
    assert float(loss.detach()) < 1e-9, "an untrained model is where the anchor holds it"
    with torch.no_grad():
        for weight in prepared.base.parameters():
            weight.mul_(1.1)
    worker_loss(trainee, trainee, config, original, two, 1, 16, Clock(CPU))
    with torch.no_grad():
        torch.testing.assert_close(seen["original"], before.encode_image(seen["pixels"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_image_side_is_all_that_images_need(family: str, tiny_trial: TrialConfig) -> None:
    model = FAMILIES[family](prepare(tiny_trial).base.tokenizer).eval()
    pixels = torch.rand(2, 3, 32, 32)
    expected = model.encode_image(pixels).detach()
    frozen = frozen_image_side(model)
    held = sum(weight.numel() for weight in frozen.parameters())
    assert held == sum(weight.numel() for weight in model.image_parameters()) > 0
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    torch.testing.assert_close(frozen.encode_image(pixels), expected)
    assert not any(weight.requires_grad for weight in frozen.parameters())


def test_training_images_are_embedded_once_for_all_trials(
    tiny_trial: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = dataclasses.replace(prepare(tiny_trial), cache_dir=tmp_path)
    rows, whole = torch.tensor([5, 0]), torch.empty(0)
    pixels = torch.from_numpy(prepared.dataset.train.pixels[rows.numpy()]) / 255
    expected = prepared.base.encode_image(pixels).detach()
    found = Original(prepared, CPU, cropped=False)(rows, whole)
    torch.testing.assert_close(found, expected)
    (kept,) = tmp_path.glob("original-*.npy")

    others = dataclasses.replace(prepared, hashes={**prepared.hashes, "base": "another"})
    monkeypatch.setattr(type(prepared.base), "encode_image", lambda model, pixels: torch.ones(len(pixels), 2))
    assert torch.equal(Original(prepared, CPU, cropped=False)(rows, whole), found), "as the first trial found them"
    assert Original(others, CPU, cropped=False)(rows, whole).shape == (2, 2), "another model has its own"
    assert Original(dataclasses.replace(prepared, cache_dir=None), CPU, cropped=False)(rows, whole).shape == (2, 2)
    kept.write_bytes(kept.read_bytes()[:-8])
    assert Original(prepared, CPU, cropped=False)(rows, whole).shape == (2, 2), "what is torn is made again"
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy", ".lock"}
