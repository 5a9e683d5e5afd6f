"""The image tower that the training attack passes through, compiled: step after step it sees batches of one shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from trainables.config import TrainingConfig
from trainables.models import RetrievalModel

Tower = Callable[[Tensor], Tensor]
"""(batch, 3, height, width) in [0, 1] -> (batch, dim)."""

_failed: set[type[RetrievalModel]] = set()
"""Families that this process could not compile."""


def through_tower(model: RetrievalModel, training: TrainingConfig, attack: Callable[[Tower], Tensor]) -> Tensor:
    """What an attack makes with the model's `encode_image`, by `torch.compile` where `training.compile` says so.

    Equal up to arithmetic. Where that fails, which is told once, the attack is made again with the tower as it is, so
    it has to be repeatable and must not wait for other workers. What is wrong with the attack itself fails there, too.
    """
    device = next(model.parameters()).device
    wanted = training.compile == "on" or (training.compile == "auto" and device.type == "cuda")
    if wanted and type(model) not in _failed:
        try:
            return attack(torch.compile(model.encode_image))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _failed.add(type(model))
            warnings.warn(f"the image tower cannot be compiled and runs as it is: {error}", stacklevel=2)
    return attack(model.encode_image)
