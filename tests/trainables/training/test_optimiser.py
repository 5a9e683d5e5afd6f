"""Every parameter is trained once, and decays where it is a matrix."""

from __future__ import annotations

import pytest

from tests.trainables.training.test_objective import FAMILIES, make
from trainables.config import Point, TrainingConfig
from trainables.training.objective import Trainee
from trainables.training.optimiser import make_optimiser

TRAINING = TrainingConfig(learning_rate=1e-4, weight_decay=0.1, temperature_reach=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("learned", [False, True])
def test_matrices_decay_and_the_temperature_has_its_own_rate(family: str, learned: bool) -> None:
    trainee = Trainee(make(family), Point(temperature_learned=learned, trainable="image"))
    groups = make_optimiser(trainee, TRAINING, 100).param_groups
    settings = {id(weight): (group["lr"], group["weight_decay"]) for group in groups for weight in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(settings)
    trained = {name: weight for name, weight in trainee.named_parameters() if weight.requires_grad}
    assert settings.keys() == {id(weight) for weight in trained.values()}
    assert ("log_temperature" in trained) == learned
    for name, weight in trained.items():
        expected = (0.04, 0.0) if name == "log_temperature" else (1e-4, 0.1 if weight.ndim > 1 else 0.0)
        assert settings[id(weight)] == pytest.approx(expected), name
    plain = {name for name, weight in trained.items() if settings[id(weight)][1] == 0}
    assert all("bias" in name or "norm" in name or "class_embedding" in name or learned for name in plain)
    assert any("norm" in name for name in plain)
