"""How many images are attacked at once, and what happens when memory does not hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from trainables.attacks.contract import Attacked, Batch, Victim
from trainables.attacks.image import Pgd, TorchAttack
from trainables.config import BATCH_IMAGES, Protocol, TinyConfig, TrialConfig
from trainables.errors import InputError
from trainables.evaluation import batching
from trainables.evaluation.batching import batches, images_at_once, kept_bytes
from trainables.evaluation.robustness import evaluate
from trainables.identity import protocol_hash
from trainables.models.clip import Clip
from trainables.prepare import prepare
from trainables.training.pretraining import train_tokenizer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def clip(layers: int) -> Clip:
    size = TinyConfig(width=32, layers=layers, heads=2, patch_pixels=8, embedding=16)
    return Clip.tiny(size, 32, 16, train_tokenizer(["a red circle"])).eval().requires_grad_(False)


def test_what_a_pass_keeps_grows_with_images_and_layers() -> None:
    model, deeper = clip(2), clip(4)
    kept = [kept_bytes(model, torch.rand(count, 3, 32, 32)) for count in (1, 2, 4)]
    assert kept[0] > 4 * 17 * 32 * 4, "at least queries, keys, values and what a layer reads"
    np.testing.assert_allclose([kept[1] / kept[0], kept[2] / kept[0]], [2, 4], rtol=0.05)
    assert kept_bytes(deeper, torch.rand(1, 3, 32, 32)) > 2 * kept[0], "the last layer keeps least"


def test_the_number_follows_free_memory_where_it_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = clip(2), torch.rand(1, 3, 32, 32)
    one = kept_bytes(model, image)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * one)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: one)
    found = []
    for images in (0, 100, 10_000):
        free = images * batching.COPIES * one * 2  # half of it is taken
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        found.append(images_at_once(model, image, Protocol(), [Pgd()], GPU))
    assert found == [1, 100, batching.MOST]
    assert images_at_once(model, image, Protocol(), [Pgd(), TorchAttack()], GPU) == BATCH_IMAGES
    assert images_at_once(model, image, Protocol(), [Pgd()], CPU) == BATCH_IMAGES
    assert images_at_once(model, image, Protocol(batch_images=7), [TorchAttack()], GPU) == 7


def test_batches_are_halved_until_memory_holds_them() -> None:
    asked: list[list[int]] = []

    def run(images: np.ndarray) -> list[int]:
        asked.append(images.tolist())
        if len(images) > 3:
            raise torch.OutOfMemoryError
        return images.tolist()

    assert list(batches(np.arange(10), 5, run)) == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    assert asked[0] == [0, 1, 2, 3, 4]
    assert len(asked) == 5, "what was too much once is not tried again"
    assert list(batches(np.arange(2), 5, run)) == [[0, 1]]
    with pytest.raises(InputError, match="no memory for 5 images at once, and what some of its attacks find depends"):
        list(batches(np.arange(10), 5, run, halve=False))
    with pytest.raises(torch.OutOfMemoryError):
        list(batches(np.arange(10), 5, lambda images: run(np.arange(5))))


@dataclass(frozen=True)
class Greedy(Pgd):
    """Takes more memory than there is for more than four images."""

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        if len(batch.pixels) > 4:
            raise torch.OutOfMemoryError
        return super().run(victim, batch)


def test_an_evaluation_goes_on_with_less_memory_and_finds_the_same(tiny_trial: TrialConfig) -> None:
    prepared = prepare(tiny_trial)
    protocol = Protocol(attacks=("image",), image_steps=2)

    def measured(attack: Pgd, **changes: Any) -> Any:
        found = evaluate(
            prepared.base,
            prepared.gallery,
            protocol.model_copy(update=changes),
            max_tokens=32,
            device=CPU,
            attacks={"image": attack},
        )
        return found.ranks["image"]

    plain, greedy = measured(Pgd(steps=2)), measured(Greedy(steps=2))
    np.testing.assert_array_equal(plain.tr, greedy.tr)
    np.testing.assert_array_equal(plain.ir, greedy.ir)


def test_a_number_that_was_the_default_is_the_same_protocol() -> None:
    assert protocol_hash(Protocol()) == protocol_hash(Protocol(batch_images=BATCH_IMAGES))
    assert protocol_hash(Protocol()) != protocol_hash(Protocol(batch_images=7))
