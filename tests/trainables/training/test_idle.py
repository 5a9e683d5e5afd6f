"""What is trained is what the loss depends on: DDP waits for all of it and has nothing to search for."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainables.models.test_families import FAMILIES, PIXELS
from tests.trainables.training.test_objective import CAPTIONS, inputs
from trainables.attacks.noise import sample_keys
from trainables.config import Point
from trainables.models import RetrievalModel
from trainables.training.objective import Trainee
from trainables.training.pretraining import train_tokenizer

FIELDS = [
    *product((0.0, 0.5, 1.0), ("anchor", "matching", "consistency"), ("all", "image", "text", "fusion"), (False,)),
    (0.0, "anchor", "all", True),
    (0.0, "matching", "all", True),
    (0.5, "matching", "all", True),
]


def make(family: str) -> RetrievalModel:
    torch.manual_seed(0)
    return FAMILIES[family](train_tokenizer(CAPTIONS)).eval()


def trained(trainee: Trainee) -> dict[str, Tensor]:
    return {name: weight for name, weight in trainee.named_parameters() if weight.requires_grad}


def loss_of(trainee: Trainee) -> Tensor:
    """Of real pairs."""
    attacked, clean = inputs(trainee.model, seed=1), inputs(trainee.model)
    positives = torch.eye(4, dtype=torch.bool)
    original = trainee.model.encode_image(clean.pixels).detach()
    return trainee(attacked, clean, original, (positives, positives), sample_keys(0, 0, torch.arange(4)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_is_what_the_loss_depends_on(family: str) -> None:
    fresh, tried = make(family), 0
    for weight, companion, trainable, learned in FIELDS:
        fields: dict[str, Any] = {"companion": companion, "trainable": trainable, "temperature_learned": learned}
        try:
            point = Point.model_validate({"contrastive_weight": weight, "temperature": 0.2, **fields})
            trainee = Trainee(copy.deepcopy(fresh), point)
        except ValueError:  # what the schema or the family refuses
            continue
        asked = trained(trainee)
        gradients = torch.autograd.grad(loss_of(trainee), list(asked.values()), allow_unused=True)
        expected = {name for name, gradient in zip(asked, gradients, strict=True) if gradient is not None}
        trainee.freeze_idle(PIXELS)
        assert trained(trainee).keys() == expected != set(), point
        tried += 1
    assert tried > 8


def test_a_part_that_nothing_reads_is_not_waited_for() -> None:
    model = make("clip")
    unread = nn.Parameter(torch.zeros(3))
    model.clip.vision_model.register_parameter("mask_token", unread)
    trainee = Trainee(model, Point(contrastive_weight=0.5))
    assert unread.requires_grad
    trainee.freeze_idle(PIXELS)
    assert not unread.requires_grad
