"""AdamW over a trainee: what decays, and how fast a learned temperature moves."""

from __future__ import annotations

import torch

from trainables.config import TrainingConfig
from trainables.training.objective import Trainee


def make_optimiser(trainee: Trainee, training: TrainingConfig, steps: int) -> torch.optim.AdamW:
    """AdamW whose groups hold their peak rate as `initial_lr`; a step sets `lr` to its share of that.

    Weights and embeddings decay; biases, norms and single tokens, which have one dimension, do not, as in CLIP and
    ALBEF. A learned temperature has a group of its own, see `TrainingConfig.temperature_reach`.

    Args:
        trainee: distributed, if it is to be.
        training: rates and decay.
        steps: of the whole training.
    """
    temperature = trainee.log_temperature
    trained = [weight for weight in trainee.parameters() if weight.requires_grad and weight is not temperature]
    learned = [temperature] if temperature.requires_grad else []
    groups = [
        ([weight for weight in trained if weight.ndim > 1], training.learning_rate, training.weight_decay),
        ([weight for weight in trained if weight.ndim <= 1], training.learning_rate, 0.0),
        (learned, 2 * training.temperature_reach / steps, 0.0),  # the schedule's mean factor is a half
    ]
    return torch.optim.AdamW(
        [
            {"params": weights, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for weights, rate, decay in groups
            if weights
        ],
        fused=temperature.is_cuda or None,
    )
