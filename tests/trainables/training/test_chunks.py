"""A batch by chunks has the gradients of the whole, draws dropout once, and holds a part of the activations."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainables.training.test_objective import FAMILIES, inputs, make
from trainables.attacks.noise import sample_keys
from trainables.config import Point
from trainables.training.chunks import by_chunks
from trainables.training.objective import Pairs, Trainee


class Held(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:
            return
        self._seen.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def layers(count: int = 16) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Tanh()) for _ in range(count))
    )


def gradients(function: Callable[..., tuple[Tensor, ...]], module: torch.nn.Module, size: int | None) -> list[Tensor]:
    rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    (found,) = by_chunks(function, size, rows)
    loss = found.softmax(0).square().sum()  # over all rows
    return list(torch.autograd.grad(loss, list(module.parameters())))


def test_both_passes_draw_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layers()
    again = gradients(lambda rows: (module(rows),), module, 10)
    monkeypatch.setattr("trainables.training.chunks.checkpoint", lambda function, *rows, use_reentrant: function(*rows))
    once = gradients(lambda rows: (module(rows),), module, 10)
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other)
    assert max(gradient.abs().max() for gradient in once) > 1e-4


def test_a_chunk_of_activations_is_held_at_a_time() -> None:
    module = layers(64).eval()
    held = {}
    for size in (None, 16):
        with Held() as counted:
            gradients(lambda rows: (module(rows),), module, size)
        held[size] = counted.most
    whole = 256 * 8 * 4 * 64  # bytes that one layer keeps of the batch, of all layers
    assert held[None] > whole
    assert held[16] < 0.3 * whole


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "point",
    [
        {"contrastive_weight": 0.0, "companion": "anchor"},
        {"contrastive_weight": 0.5, "distillation": 0.5, "pairs": "crossed", "temperature_learned": True},
        {"contrastive_weight": 0.5, "companion": "consistency"},
    ],
)
def test_chunks_have_the_gradients_of_the_whole(family: str, point: dict[str, Any], size: int) -> None:
    found = []
    for micro_batch in (None, size):
        model = make(family)
        attacked, clean = inputs(model, seed=1), inputs(model)
        twice = Pairs(attacked.pixels, attacked.tokens.repeat_interleave(2, 0), attacked.mask.repeat_interleave(2, 0))
        trainee = Trainee(model, Point(temperature=0.2, **point), micro_batch)
        trainee.freeze_idle(32)
        if micro_batch == 3:
            model.checkpoint_layers()  # one within the other
        positives = torch.eye(4).repeat_interleave(2, 1) > 0
        clean = clean._replace(tokens=clean.tokens.repeat_interleave(2, 0), mask=clean.mask.repeat_interleave(2, 0))
        original = model.encode_image(clean.pixels).detach()
        loss = trainee(twice, clean, original, (positives, positives.T), sample_keys(0, 0, torch.arange(8)), 0.5)
        loss.backward()
        found.append({name: weight.grad for name, weight in trainee.named_parameters() if weight.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
