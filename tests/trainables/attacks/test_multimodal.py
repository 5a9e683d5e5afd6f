"""Attacks on both: the batched ones equal the published ones, with their quirks and without."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from attack_world import World
from torch import Tensor

from benchmarks.as_published import as_published, draws_of
from benchmarks.published.attacks import Pairs
from benchmarks.published.images import scale_set
from trainables.attacks.cmi import CmiAttack
from trainables.attacks.co_attack import CoAttack
from trainables.attacks.contract import Attack, Attacked
from trainables.attacks.image import Pgd
from trainables.attacks.noise import normal, step_keys
from trainables.attacks.quirks import Quirk, Quirks
from trainables.attacks.sep import SepAttack
from trainables.attacks.sga import Dra, Sga, scaled_copies
from trainables.attacks.text import BertAttack

EPSILON, STEPS = 8 / 255, 4
ATTACKS: dict[str, Any] = {
    "co": CoAttack,
    "sga": Sga,
    "dra": Dra,
    "cmi": CmiAttack,
    "sep": partial(SepAttack, objective="deviation"),
}


def published(world: World, attack: Any) -> Attacked:
    """The published attack with our random numbers; DRA's with one image a batch."""
    batch, reading = world.batch(), world.reading(attack.quirks, attack.candidates)
    images = list(range(len(world.pixels)))
    parts = []
    for own in [[image] for image in images] if isinstance(attack, Dra) else [images]:
        rows = [row for row, owner in enumerate(world.owner) if owner in own]
        owners = [own.index(world.owner[row]) for row in rows]
        pairs = Pairs(batch.pixels[own], [world.texts[row] for row in rows], owners)
        draws = draws_of(batch.keys[own], tuple(batch.pixels.shape[1:]), attack.steps)
        parts.append(as_published(attack, world.plain_victim, reading, pairs, draws))
    pixels, captions = zip(*parts, strict=True)
    return Attacked(torch.cat(pixels), list(chain.from_iterable(captions)))


def differing(first: Attacked, second: Attacked) -> float:
    """Share of pixels that differ: a sign flips where rounding decides it."""
    return ((first.pixels - second.pixels).abs() > 1e-6).float().mean().item()


@pytest.mark.parametrize("mode", ["correct", "compat"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_equals_the_published_one(world: World, name: str, mode: str) -> None:
    """Over budgets and contents, down to one step and up to most of the pixels' range."""
    draw = np.random.default_rng([len(name), ord(name[0]), mode == "compat"])
    for epsilon in (2 / 255, 8 / 255, 64 / 255):
        chosen = draw.choice(len(world.pixels), size=3, replace=False).tolist()
        few = world.permuted(chosen).shortened(30)
        few = replace(few, pixels=255 * (few.pixels > 127)) if epsilon > 0.1 else few
        attack = ATTACKS[name](
            epsilon=epsilon,
            steps=int(draw.integers(1, 5)),
            words=int(draw.integers(1, 4)),
            candidates=int(draw.integers(2, 11)),
            quirks=ATTACKS[name]().known_quirks if mode == "compat" else frozenset(),
        )
        attacked, expected = attack.run(few.victim, few.batch()), published(few, attack)
        assert attacked.captions == expected.captions, attack
        assert differing(attacked, expected) < (1e-2 if epsilon > 0.1 else 5e-3), attack  # long steps carry a flip on
        assert attacked.captions != few.texts
        assert (attacked.pixels - few.batch().pixels).abs().max() == pytest.approx(epsilon, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "quirk"),
    [
        ("co", "one_sided_start"),
        ("co", "last_caption"),
        ("sga", "supervision_30_tokens"),
        ("dra", "supervision_30_tokens"),
        ("dra", "free_look_ahead"),
    ],
)
def test_every_quirk_of_the_images_shows(world: World, name: str, quirk: Quirk) -> None:
    """Otherwise the comparisons above would compare nothing."""
    world = replace(world, pixels=255 * (world.pixels > 127))  # many pixels at the bounds, for the look-ahead

    def run(quirks: Quirks) -> Attacked:
        return ATTACKS[name](epsilon=64 / 255, steps=STEPS, quirks=quirks).run(world.victim, world.batch())

    assert differing(run(frozenset()), run(frozenset({quirk}))) > 1e-3


@pytest.mark.parametrize("side", [(20, 31), (32, 32), (7, 5), (64, 48)])
def test_copies_are_the_published_ones_in_full_precision(side: tuple[int, int]) -> None:
    """Clamped once, between the two resizes."""
    pixels, keys = torch.rand(3, 3, *side).round().requires_grad_(True), torch.arange(3)
    expected = torch.cat(scale_set(pixels, lambda copy: normal(step_keys(keys, copy + 1), (3, *side))))
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            copies = scaled_copies(pixels, keys)
        torch.testing.assert_close(copies, expected, rtol=0, atol=3e-6)
    assert copies.min() < -0.01
    weights = torch.rand_like(copies)
    gradients = [torch.autograd.grad((weights * c).sum(), pixels)[0] for c in (copies, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["cross", "deviation"])
def test_sep_attack_is_its_two_parts(world: World, objective: Any) -> None:
    batch, victim = world.batch(), world.victim
    attacked = SepAttack(epsilon=EPSILON, steps=3, words=2, objective=objective).run(victim, batch)
    image, text = Pgd(epsilon=EPSILON, steps=3, objective=objective), BertAttack(words=2, objective=objective)
    assert torch.equal(attacked.pixels, image.run(victim, batch).pixels)
    assert attacked.captions == text.run(victim, batch).captions


def test_momentum_of_cmi_begins_with_the_captions(world: World) -> None:
    """Its first step has a velocity already; without momentum there is nothing to begin with."""

    def run(momentum: float) -> Attacked:
        return CmiAttack(epsilon=EPSILON, steps=STEPS, momentum=momentum).run(world.victim, world.batch())

    assert differing(run(0.9), run(0.0)) > 1e-3


@pytest.mark.parametrize("attack", [kind(epsilon=EPSILON, steps=STEPS) for kind in (CoAttack, Sga, Dra)])
def test_images_lose_their_captions(world: World, attack: Attack) -> None:
    """What the attacks are for: the attacked pairs are less alike than the clean ones."""
    batch, victim = world.batch(), world.victim
    attacked = attack.run(victim, batch)

    def alike(pixels: Tensor, texts: list[str]) -> Tensor:
        return (victim.encode_image(pixels)[batch.owner] * batch.encode(texts)).sum(1).mean()

    assert alike(attacked.pixels, attacked.captions) < alike(batch.pixels, batch.captions()) - 0.01
