"""Models that hide their gradients survive attacks that follow them, and fall to those that do not."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_world import World
from torch import Tensor

from trainables.attacks.apgd import Apgd
from trainables.attacks.contract import Attack, Victim
from trainables.attacks.image import Pgd
from trainables.attacks.joint import Both
from trainables.attacks.rivals import Rivals
from trainables.attacks.sga import Sga
from trainables.attacks.threat_model import check
from trainables.attacks.transfer import Transfer

EPSILON = 8 / 255
LEVELS = 64


@pytest.fixture
def masked(world: World) -> Victim:
    """A model that rounds what it sees, so that its gradients are zero everywhere."""
    model: Any = copy.deepcopy(world.model)
    original = model.encode_image
    model.encode_image = lambda pixels: original((pixels * LEVELS).round() / LEVELS)
    with torch.no_grad():
        images = torch.nn.functional.normalize(model.encode_image(torch.tensor(world.pixels) / 255), dim=-1)
    return replace(world.victim, model=model, image_features=images)


def lost(victim: Victim, world: World, attack: Attack) -> Tensor:
    """(images,) by how much the margin of the images with the clean captions falls."""
    batch = world.batch()
    attacked = attack.run(victim, batch)
    check(attack, batch, attacked)
    objective = Rivals(victim, batch, "margin").of_images(victim.text_features, "both")
    with torch.no_grad():
        return objective(attacked.pixels, 0) - objective(batch.pixels, 0)


def test_rounded_activations_fall_to_examples_of_the_model_behind_them(
    world: World, masked: Victim, tmp_path: Path
) -> None:
    world.model.save(tmp_path / "base")
    for blind in (Pgd(epsilon=EPSILON, steps=10), Apgd(epsilon=EPSILON, steps=10)):
        assert (lost(masked, world, blind) == 0).all(), "there is no gradient to follow"
    transferred = lost(masked, world, Transfer(str(tmp_path / "base"), epsilon=EPSILON, steps=20))
    assert (transferred > 0).all()
    assert (transferred > lost(masked, world, Sga(epsilon=EPSILON, steps=10)) + 1e-2).all()


def test_rounded_activations_do_not_protect_captions(world: World, masked: Victim) -> None:
    """The search of words follows no gradient."""
    for victim in (masked, world.victim):
        batch = world.batch()
        attacked = Both(epsilon=EPSILON, steps=2).run(victim, batch)
        with torch.no_grad():
            images = victim.encode_image(attacked.pixels)[batch.owner]
        before, after = ((batch.encode(text) * images).sum(1) for text in (batch.captions(), attacked.captions))
        assert (after < before - 1e-2).float().mean() > 0.7
