"""Base models and language models are made from as much, or as little, as there is."""

import pytest
import torch

from trainables.training.pretraining import _optimiser


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 9, 10, 11, 20, 100])
def test_a_rate_rises_and_falls_in_any_number_of_steps(steps: int) -> None:
    weights = torch.nn.Parameter(torch.ones(1))
    optimiser, schedule = _optimiser([weights], 0.1, steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    assert all(0 < rate <= 0.1 for rate in rates)
    assert steps < 9 or max(rates) > rates[0]
    assert steps < 3 or rates[-1] < 0.01
