"""An evaluation goes on where it was interrupted, and where memory is short, and finds the same."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.tiny_families import FAMILIES
from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.image import Pgd
from trainables.attacks.sep import SepAttack
from trainables.attacks.text import BertAttack
from trainables.config import Protocol, TrialConfig
from trainables.evaluation.audit import audit
from trainables.evaluation.robustness import Evaluation, evaluate
from trainables.prepare import prepare

CPU = torch.device("cpu")


class Lost(Exception):
    """Ends an evaluation in the middle."""


class Memory:
    """Keeps pieces in this process, and ends the evaluation after some."""

    def __init__(self, pieces: Iterable[dict[str, Tensor]] = (), every: int = 1, most: int = 99) -> None:
        self.pieces, self._calls = list(pieces), itertools.count(1)
        self._every, self._most = every, most

    def load(self) -> list[dict[str, Tensor]]:
        return self.pieces

    def due(self) -> bool:
        return next(self._calls) % self._every == 0

    def save(self, piece: dict[str, Tensor]) -> None:
        self.pieces.append({name: tensor.clone() for name, tensor in piece.items()})
        if len(self.pieces) == self._most:
            raise Lost


@dataclass(frozen=True)
class Counted(Pgd):
    """Counts the images it attacks."""

    attacked: ClassVar[list[int]] = []

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        self.attacked.extend(batch.labels.tolist())
        return super().run(victim, batch)


@dataclass(frozen=True)
class Spelled(BertAttack):
    """Gives its captions as strings."""

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        attacked = super().run(victim, batch)
        return Attacked(attacked.pixels, list(attacked.captions))


ATTACKS = {"image": Counted(steps=2), "text": Spelled(), "both": SepAttack(steps=2)}


def measured(
    trial: TrialConfig, family: str, kept: Any = None, attacks: Mapping[str, Attack] = ATTACKS, **changes: Any
) -> Evaluation:
    prepared = prepare(trial)
    torch.manual_seed(0)
    model = FAMILIES[family](prepared.base.tokenizer).eval()
    fields = {"image_steps": 2, "batch_images": 3, "rerank": 4 if family in ("albef", "blip") else None}
    protocol = Protocol(**{**fields, "attacks": tuple(attacks), **changes})
    return evaluate(model, prepared.gallery, protocol, max_tokens=32, device=CPU, attacks=attacks, kept=kept)


def same(one: Evaluation, two: Evaluation) -> None:
    assert one.ranks.keys() == two.ranks.keys()
    for target, ranks in one.ranks.items():
        np.testing.assert_array_equal(ranks.tr, two.ranks[target].tr, err_msg=target)
        np.testing.assert_array_equal(ranks.ir, two.ranks[target].ir, err_msg=target)
    for target, features in one.features.items():
        assert all(torch.equal(a, b) for a, b in zip(features, two.features[target], strict=True)), target


@pytest.mark.parametrize(("family", "rounded"), [("clip", True), ("albef", False), ("blip", True)])
def test_an_interrupted_evaluation_does_the_rest_only(family: str, rounded: bool, tiny_trial: TrialConfig) -> None:
    whole = measured(tiny_trial, family, eight_bit=rounded)
    for every, most, left in ((1, 3, 3), (2, 1, 6), (2, 2, 0)):
        memory = Memory(every=every, most=most)
        with pytest.raises(Lost):
            measured(tiny_trial, family, memory, eight_bit=rounded)
        Counted.attacked.clear()
        same(whole, measured(tiny_trial, family, Memory(memory.pieces[::-1]), eight_bit=rounded))
        assert len(Counted.attacked) == left, "of twelve"


def test_what_is_partly_another_workers_is_done_again_and_what_is_there_twice_counts_once(
    tiny_trial: TrialConfig,
) -> None:
    whole, memory = measured(tiny_trial, "clip"), Memory()
    measured(tiny_trial, "clip", memory)
    stray = {**memory.pieces[0], "images": torch.tensor([0, 1, 99])}
    Counted.attacked.clear()
    twice = memory.pieces[-1]
    same(whole, measured(tiny_trial, "clip", Memory([stray, *memory.pieces[2:], twice])))
    assert sorted(Counted.attacked) == list(range(6))


HELD = 2
"""Images that memory holds."""


@dataclass(frozen=True)
class Greedy(Pgd):
    """Needs more memory than a process has, for more images than `HELD`, of the ranks told."""

    ranks: tuple[int, ...] = (0, 1)

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        if len(batch.pixels) > HELD and (dist.get_rank() if dist.is_initialized() else 0) in self.ranks:
            raise torch.OutOfMemoryError
        return super().run(victim, batch)


def worker(rank: int, trial: TrialConfig, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {
        name: measured(trial, "clip", attacks={"image": attack}, batch_images=5)
        for name, attack in {"plain": Pgd(steps=2), "greedy": Greedy(steps=2, ranks=(1,))}.items()
    }
    sizes = {name: one.images_at_once for name, one in found.items()}
    ranks = {
        f"{name} {side}": torch.from_numpy(getattr(one.ranks["image"], side))
        for name, one in found.items()
        for side in ("tr", "ir")
    }
    torch.save((sizes, ranks), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_one_of_two_workers_has_less_memory(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    prepare(tiny_trial)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainables.training.finetune"])
    processes = [context.Process(target=worker, args=(rank, tiny_trial, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    alone = measured(tiny_trial, "clip", attacks={"image": Pgd(steps=2)}).ranks["image"]
    for rank, least in enumerate((3, HELD - 1)):
        sizes, ranks = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert sizes == {"plain": 3, "greedy": least}
        for name, found in ranks.items():
            np.testing.assert_array_equal(found, getattr(alone, name.split()[1]), err_msg=name)


def short_of_memory(most: int, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, where there is memory for so many rows of its first tensor only."""

    def limited(pixels: Tensor, *rest: Tensor) -> Tensor:
        if len(pixels) > most:
            raise torch.OutOfMemoryError
        return function(pixels, *rest)

    return limited


@pytest.mark.parametrize("family", ["clip", "albef"])
def test_an_audit_and_a_second_look_take_less_memory(
    family: str, tiny_trial: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, protocol = (
        prepare(tiny_trial),
        Protocol(image_steps=2, attacks=(), rerank=4 if family == "albef" else None),
    )
    torch.manual_seed(0)
    model = FAMILIES[family](prepared.base.tokenizer).eval()
    fields: dict[str, Any] = {"max_tokens": 32, "device": CPU}

    def looked_at() -> tuple[Any, ...]:
        found = audit(model, prepared.gallery, protocol, temperature=0.07, **fields)
        honest = [check for check in found.checks if "black box" not in check.name]  # draws by the batch
        return honest, evaluate(model, prepared.gallery, protocol, **fields)

    checks, ranks = looked_at()
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_image", short_of_memory(2, model.encode_image))
        if family == "albef":
            patch.setattr(model, "itm_logits", short_of_memory(6, model.itm_logits))
            patch.setattr(model, "image_tokens", short_of_memory(2, model.image_tokens))
        fewer, again = looked_at()
        assert fewer == checks
        for target, found in ranks.ranks.items():
            np.testing.assert_array_equal(found.tr, again.ranks[target].tr, err_msg=target)
        patch.setattr(model, "encode_image", short_of_memory(0, model.encode_image))
        with pytest.raises(torch.OutOfMemoryError):
            looked_at()
