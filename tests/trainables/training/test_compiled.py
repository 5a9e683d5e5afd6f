"""A compiled image tower attacks like one that is not, is compiled once, and gives way where it cannot be compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, PIXELS
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from trainables.attacks.image import pgd
from trainables.config import TrainingConfig
from trainables.models import RetrievalModel
from trainables.precision import attackable
from trainables.training import compiled
from trainables.training.compiled import Tower, through_tower
from trainables.training.pretraining import train_tokenizer

CPU = torch.device("cpu")
KEYS = torch.arange(2)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled, without the seconds that code generation takes."""
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    torch.set_float32_matmul_precision("highest")  # said once, as by a worker: what was compiled before does not fit
    monkeypatch.setattr(compiled, "_failed", set())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    return seen


def model_of(family: str) -> RetrievalModel:
    torch.manual_seed(0)
    return FAMILIES[family](train_tokenizer(["a red circle", "two blue squares"]))


def attack_on(pixels: Tensor) -> Callable[[Tower], Tensor]:
    return lambda tower: pgd(
        pixels, lambda tried: tower(tried).float().square().sum(1), epsilon=8 / 255, steps=2, keys=KEYS
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_once_for_all_steps_with_the_same_result(
    family: str, graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though weights move from step to step, and are other tensors: those that were cast for the attack."""
    monkeypatch.setattr("trainables.precision.nullcontext", lambda: torch.autocast("cpu", torch.bfloat16))
    model = model_of(family)
    for step in range(3):
        attack = attack_on(torch.rand(2, 3, PIXELS, PIXELS))
        with attackable(model, CPU):
            found = through_tower(model, TrainingConfig(compile="on"), attack)
            assert torch.equal(found, attack(model.encode_image))
        assert len(graphs) == 1, step
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)


def test_left_alone_on_a_cpu_unless_asked(graphs: list[Any]) -> None:
    model, attack = model_of("clip"), attack_on(torch.rand(2, 3, PIXELS, PIXELS))
    for switch in ("auto", "off"):
        through_tower(model, TrainingConfig.model_validate({"compile": switch}), attack)
    assert not graphs


def test_what_cannot_be_compiled_is_told_once_and_attacked_as_it_is(graphs: list[Any]) -> None:
    model = model_of("clip")
    encode = model.encode_image

    def broken(pixels: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return encode(pixels)

    model.encode_image = broken
    attack = attack_on(torch.rand(2, 3, PIXELS, PIXELS))
    with pytest.warns(UserWarning, match="the image tower cannot be compiled") as told:
        found = [through_tower(model, TrainingConfig(compile="on"), attack) for _ in range(2)]
    assert len([warning for warning in told if "compiled" in str(warning.message)]) == 1
    assert torch.equal(found[0], attack(encode))
    assert torch.equal(found[1], found[0])


def test_a_full_memory_is_no_failure_to_compile(graphs: list[Any]) -> None:
    def attack(tower: Tower) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        through_tower(model_of("clip"), TrainingConfig(compile="on"), attack)
    assert not compiled._failed
