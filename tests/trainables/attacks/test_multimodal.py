"""Attacks on both: the batched ones equal the published loops, with their quirks and without."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from attack_world import World, copies_noise
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.cmi import CmiAttack
from trainables.attacks.co_attack import CoAttack
from trainables.attacks.contract import Attack, Attacked
from trainables.attacks.image import Pgd, random_start
from trainables.attacks.noise import normal, step_keys, uniform
from trainables.attacks.quirks import Quirk, Quirks
from trainables.attacks.sep import SepAttack
from trainables.attacks.sga import Dra, Sga, scaled_copies
from trainables.attacks.text import BertAttack

EPSILON, STEPS = 8 / 255, 4
ATTACKS: dict[str, Any] = {"co": CoAttack, "sga": Sga, "dra": Dra, "cmi": CmiAttack}


def build(name: str, quirks: Quirks, words: int = 1) -> Any:
    return ATTACKS[name](epsilon=EPSILON, steps=STEPS, words=words, quirks=quirks)


def published(world: World, name: str, quirks: Quirks, words: int = 1) -> Attacked:
    """The published loop of that attack, image by image where it has no batches, with our random numbers."""
    loops, batch = world.published(quirks, words, steps=STEPS), world.batch()
    images = range(len(world.pixels))
    own = [[world.texts[row] for row in range(len(world.texts)) if world.owner[row] == image] for image in images]
    start = random_start(batch.pixels, EPSILON, batch.keys, one_sided="one_sided_start" in quirks)

    def of_image(image: int) -> tuple[Tensor, list[str]]:
        rows = slice(image, image + 1)
        pixels, key, captions = batch.pixels[rows], batch.keys[rows], own[image]
        if name == "co":
            return loops.co_attack(pixels, captions, start[rows], epsilon=EPSILON)

        def shares(step: int) -> Tensor:
            draws = -torch.log1p(-uniform(step_keys(key, 1000 + step), (5, 3)))[0]
            return draws / draws.sum(1, keepdim=True)

        zeros, noise = [0] * len(captions), copies_noise(key)
        return loops.dra(pixels, captions, zeros, start[rows], noise, shares, epsilon=EPSILON)

    if name in ("sga", "cmi"):
        noise, owner = copies_noise(batch.keys), world.owner.tolist()
        if name == "sga":
            return Attacked(*loops.sga(batch.pixels, world.texts, owner, start, noise, epsilon=EPSILON))
        second = random_start(batch.pixels, EPSILON, step_keys(batch.keys, 1))
        return Attacked(*loops.cmi(batch.pixels, world.texts, owner, (start, second), noise, epsilon=EPSILON))
    pixels, captions = zip(*map(of_image, images), strict=True)
    return Attacked(torch.cat(pixels), list(chain.from_iterable(captions)))


def differing(first: Attacked, second: Attacked) -> float:
    """Share of pixels that differ: a sign flips where rounding decides it."""
    return ((first.pixels - second.pixels).abs() > 1e-6).float().mean().item()


@pytest.mark.parametrize("mode", ["correct", "compat"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_equals_the_published_loop(world: World, name: str, mode: str) -> None:
    quirks = ATTACKS[name].known_quirks if mode == "compat" else frozenset()
    attacked = build(name, quirks).run(world.victim, world.batch())
    expected = published(world, name, quirks)
    assert attacked.captions == expected.captions
    assert differing(attacked, expected) < 5e-3
    assert attacked.captions != world.texts
    assert (attacked.pixels - world.batch().pixels).abs().max() == pytest.approx(EPSILON, abs=1e-6)


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


def test_copies_are_resized_as_interpolate_does_in_full_precision() -> None:
    pixels, keys = torch.rand(3, 3, 20, 31, requires_grad=True), torch.arange(3)
    expected = [pixels]
    for index, scale in enumerate((0.5, 0.75, 1.25, 1.5)):
        small = (int(scale * 20), int(scale * 31))
        noisy = pixels + 0.05 * normal(step_keys(keys, index + 1), (3, 20, 31))
        resized = F.interpolate(noisy, small, mode="bicubic").clamp(0, 1)
        expected.append(F.interpolate(resized, (20, 31), mode="bicubic").clamp(0, 1))
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            copies = scaled_copies(pixels, keys)
        torch.testing.assert_close(copies, torch.cat(expected), rtol=0, atol=2e-6)
    weights = torch.rand_like(copies)
    gradients = [torch.autograd.grad((weights * c).sum(), pixels)[0] for c in (copies, torch.cat(expected))]
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
