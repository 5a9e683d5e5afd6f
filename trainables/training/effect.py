"""Whether training had an effect."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainables.training.objective import Trainee

MOVED = 1e-5
"""Of the weights' norm: less is no training. Tiny models answer every query as before up to ten times that."""


def trained_weights(trainee: Trainee) -> dict[str, Tensor]:
    """A copy of what will be trained of the model, on the CPU, by name."""
    named = trainee.model.named_parameters()
    return {name: weight.detach().to("cpu", copy=True) for name, weight in named if weight.requires_grad}


@torch.no_grad()
def untouched(trainee: Trainee, before: Mapping[str, Tensor], steps: int) -> str | None:
    """Why the model is still the one that training began with, or None.

    Args:
        trainee: after training, its weights whole.
        before: its `trained_weights` before.
        steps: there were.
    """
    if trainee.nothing_to_learn:
        return "the loss is the distance to the base model's clean embeddings, which is 0 without an attack on images"
    now = dict(trainee.model.named_parameters())
    moved = math.hypot(*(float((now[name].cpu() - weight).norm()) for name, weight in before.items()))
    length = math.hypot(*(float(weight.norm()) for weight in before.values()))
    if moved > MOVED * length:
        return None
    return f"{steps} steps moved its weights by {moved / (length or 1):.1g} of their norm"
