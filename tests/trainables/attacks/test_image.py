"""Attacks on pixels: budgets, and randomness that belongs to the sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainables.attacks.image import pgd
from trainables.attacks.noise import sample_keys, uniform


@given(epsilon=st.floats(0.001, 0.2), steps=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_pgd_stays_in_its_ball_and_raises_the_objective(epsilon: float, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(3, 3, 8, 8, generator=generator)
    direction = torch.randn(3, 8, 8, generator=generator)
    objective = lambda x: (x * direction).sum((1, 2, 3))  # noqa: E731
    attacked = pgd(pixels, objective, epsilon=epsilon, steps=steps, keys=sample_keys(seed, 0, torch.arange(3)))
    assert (attacked - pixels).abs().max() <= epsilon + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (objective(attacked) > objective(pixels)).all()


def test_noise_belongs_to_the_sample() -> None:
    ids = torch.tensor([7, 8, 9])
    noise = uniform(sample_keys(1, 2, ids), (3, 32, 32))
    alone = uniform(sample_keys(1, 2, ids[1:2]), (3, 32, 32))
    assert torch.equal(noise[1:2], alone)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, uniform(sample_keys(1, 3, ids), (3, 32, 32)))
    assert noise.mean().item() == pytest.approx(0.5, abs=0.02)
    assert noise.var().item() == pytest.approx(1 / 12, abs=0.01)
