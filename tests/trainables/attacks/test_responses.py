"""The retrieval loss, APGD and best responses, against slow forms written from their definitions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from attack_world import World
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainables.attacks.apgd import Apgd, apgd, looks
from trainables.attacks.image import random_start
from trainables.attacks.joint import TOLERANCE, Joint
from trainables.attacks.rivals import SHARPNESS, Direction, Loss, Rivals
from trainables.attacks.search import TextSearch

EPSILON = 8 / 255
LOSSES: tuple[Loss, ...] = ("cross", "margin", "cosine")
DIRECTIONS: tuple[Direction, ...] = ("tr", "ir", "both")


def slow_loss(world: World, images: Tensor, captions: Tensor, loss: Loss, direction: Direction) -> list[float]:
    """Of attacked images and captions of the whole world, in double precision, one pair after another."""
    victim, owner, texts = world.victim, world.owner.tolist(), world.texts
    clean_images, clean_texts = (part.double().numpy() for part in (victim.image_features, victim.text_features))
    one, other = images.double().numpy(), captions.double().numpy()
    found = []
    for image in range(len(one)):
        own = [row for row, home in enumerate(owner) if home == image]
        held = [float(other[row] @ one[image]) for row in own]
        if loss == "cosine":
            found.append(-float(np.mean(held)) * (2 if direction == "both" else 1))
            continue
        described = {texts[row] for row in own}
        wrong = [float(clean_texts[row] @ one[image]) for row in range(len(texts)) if texts[row] not in described]
        sharp = SHARPNESS / np.std(clean_texts @ clean_images[image], ddof=1)
        as_query = ahead(wrong, held, sharp, loss)
        as_answers = []
        for row, cosine in zip(own, held, strict=True):
            right = {home for home, text in zip(owner, texts, strict=True) if text == texts[row]}
            wrong = [float(other[row] @ clean_images[j]) for j in range(len(one)) if j not in right]
            sharp = SHARPNESS / np.std(clean_images @ clean_texts[row], ddof=1)
            as_answers.append(ahead(wrong, [cosine], sharp, loss))
        found.append({"tr": as_query, "ir": np.mean(as_answers), "both": as_query + np.mean(as_answers)}[direction])
    return found


def ahead(wrong: list[float], right: list[float], sharp: float, loss: Loss) -> float:
    if loss == "margin":
        return max(wrong) - max(right)
    everything = np.exp(sharp * np.array([*wrong, *right]))
    return float(-np.log(everything[len(wrong) :].sum() / everything.sum()))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("twins", [False, True])
def test_the_loss_is_what_its_definition_says(world: World, loss: Loss, direction: Direction, twins: bool) -> None:
    if twins:
        captions = [*world.captions[:8], world.captions[0]]
        world = World(world.model, world.masked_lm, world.tokenizer, world.pixels, captions)
    victim, batch = world.victim, world.batch()
    pixels = random_start(batch.pixels, 0.3, batch.keys)
    texts = victim.text_features.roll(1, 0)
    objective = Rivals(victim, batch, loss).of_images(texts, direction)
    with torch.no_grad():
        found = objective(pixels, 0)
        slow = slow_loss(world, victim.encode_image(pixels), texts, loss, direction)
    np.testing.assert_allclose(found.numpy(), slow, rtol=1e-3, atol=1e-4)


def slow_apgd(x: Any, objective: Any, start: Any, epsilon: float, steps: int) -> Any:
    """One image at a time, as the published algorithm reads."""
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)

    def at(point: Any) -> tuple[float, Any]:
        point = point.clone().requires_grad_(True)
        value = objective(point[None], 0).sum()
        return value.item(), torch.autograd.grad(value, point)[0]

    points, (first, gradient) = [start], at(start)
    values, best, size, halved, window = [first], (first, start, gradient), 2 * epsilon, True, max(int(0.22 * steps), 1)
    last_look, at_last_look = 0, first
    current, before = start, start
    for step in range(1, steps + 1):
        z = (current + size * gradient.sign()).clamp(low, high)
        a = 1.0 if step == 1 else 0.75
        new = (current + a * (z - current) + (1 - a) * (current - before)).clamp(low, high)
        before, current = current, new
        value, gradient = at(current)
        points.append(current)
        values.append(value)
        if value > best[0]:
            best = value, current, gradient
        if step == last_look + window:
            rises = sum(values[j] > values[j - 1] for j in range(last_look + 1, step + 1))
            stuck = rises <= 0.75 * window or (not halved and best[0] <= at_last_look)
            if stuck:
                size, current, gradient = size / 2, best[1], best[2]
            halved, at_last_look, last_look = stuck, best[0], step
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return best[1], best[0]


@given(steps=st.integers(1, 60), seed=st.integers(0, 99), curve=st.floats(1, 40))
@settings(max_examples=25, deadline=None)
def test_apgd_is_the_published_algorithm(steps: int, seed: int, curve: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    pixels, push = (torch.rand(3, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))

    def objective(points: Tensor, _: int) -> Tensor:
        return (torch.sin(curve * points) * push[: len(points)]).sum((1, 2, 3)) - 9 * (points**2).mean((1, 2, 3))

    start = (pixels + 0.05 * torch.rand(3, 3, 4, 4, generator=draw)).clamp(0, 1)
    found, value = apgd(pixels, objective, start, epsilon=0.1, steps=steps)
    torch.testing.assert_close(objective(found, 0), value)
    for image in range(3):
        push_of = push[image : image + 1]

        def alone(points: Tensor, _: int, push_of: Tensor = push_of) -> Tensor:
            return (torch.sin(curve * points) * push_of).sum((1, 2, 3)) - 9 * (points**2).mean((1, 2, 3))

        slow, reached = slow_apgd(pixels[image], alone, start[image], 0.1, steps)
        torch.testing.assert_close(found[image], slow)
        assert abs(value[image].item() - reached) < 1e-9


def test_looks_are_those_of_the_paper() -> None:
    assert list(looks(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert all(list(looks(steps))[-1] <= steps for steps in range(1, 200))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_image_is_attacked_whatever_was_wrong_before(world: World, direction: Direction) -> None:
    """In a world of random weights most first answers are wrong."""
    victim, batch = world.victim, world.batch()
    attack = Apgd(epsilon=EPSILON, steps=20, direction=direction)
    attacked = attack.run(victim, batch)
    objective = Rivals(victim, batch, attack.loss).of_images(victim.text_features, direction)
    with torch.no_grad():
        gained = objective(attacked.pixels, 0) - objective(batch.pixels, 0)
    assert (gained > 1e-3).all()


@pytest.mark.parametrize(("restarts", "targets"), [(3, 0), (1, 3)])
def test_more_runs_are_not_weaker(world: World, restarts: int, targets: int) -> None:
    victim, batch = world.victim, world.batch()
    objective = Rivals(victim, batch, "margin").of_images(victim.text_features, "both")
    one, many = (
        Apgd(epsilon=EPSILON, steps=4, loss="margin", restarts=runs, targets=aims).run(victim, batch).pixels
        for runs, aims in ((1, 0), (restarts, targets))
    )
    with torch.no_grad():
        gained = objective(many, 0) - objective(one, 0)
    assert (gained >= -1e-6).all()
    assert (gained > 1e-5).any()


@pytest.mark.parametrize(("loss", "direction"), itertools.product(LOSSES, DIRECTIONS))
def test_neither_side_gains_by_another_answer(world: World, loss: Loss, direction: Direction) -> None:
    victim, batch = world.victim, world.batch()
    attack = Joint(epsilon=EPSILON, steps=5, first_steps=5, rounds=50, loss=loss, direction=direction)
    attacked = attack.run(victim, batch)
    rivals = Rivals(victim, batch, loss)
    with torch.no_grad():
        reached = rivals.of_images(batch.encode(attacked.captions), direction)(attacked.pixels, 0)
        features = victim.encode_image(attacked.pixels)
    answer = TextSearch(loss="cosine" if direction == "tr" else loss).captions(victim, batch, features)
    objective = rivals.of_images(batch.encode(answer), direction)
    _, other = apgd(batch.pixels, objective, attacked.pixels, epsilon=EPSILON, steps=5)
    assert (other <= reached + TOLERANCE + 1e-5).all()
    alone = Apgd(epsilon=EPSILON, steps=5, loss=loss, direction=direction).run(victim, batch)
    with torch.no_grad():
        image_only = rivals.of_images(victim.text_features, direction)(alone.pixels, 0)
    assert (reached >= image_only - 1e-5).all()
    assert (reached > image_only + 1e-2).any()
