"""Adversarial examples are found again only where everything they were made from is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainables.models.test_families import CAPTIONS, make
from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.registry import build_attack
from trainables.config import AttackConfig, Protocol, TrialConfig
from trainables.evaluation.adversarial import AdversarialCache, victim_digest
from trainables.prepare import prepare
from trainables.training.pretraining import train_tokenizer


@dataclasses.dataclass(frozen=True, repr=False)
class Silent(Attack):
    """Shows none of its options, and looks like any other one of its kind."""

    changes = frozenset()
    strength: int = 1

    def __repr__(self) -> str:
        return "Silent()"

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        return Attacked(batch.pixels, batch.captions())


@pytest.fixture(scope="module")
def fields(tiny_trial: TrialConfig) -> dict[str, Any]:
    prepared = prepare(tiny_trial)
    return {
        "victim": victim_digest(make("clip"), 16),
        "attack": Silent(),
        "protocol": Protocol(),
        "gallery": prepared.gallery.first(4),
        "hashes": {"data": "d", "substitutes": "s"},
    }


def other_tokenizer() -> Any:
    model = make("clip")
    model.tokenizer = train_tokenizer(CAPTIONS[1:])
    return model


def other_activation() -> Any:
    model = make("clip")
    for module in model.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = torch.nn.ReLU()
    return model


def other_weight() -> Any:
    model = make("clip")
    next(model.parameters()).data.add_(1e-3)
    return model


OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "masked language model": lambda: {"hashes": {"data": "d", "substitutes": "t"}},
    "data": lambda: {"hashes": {"data": "e", "substitutes": "s"}},
    "tokens": lambda: {"victim": victim_digest(make("clip"), 12)},
    "an option that is not shown": lambda: {"attack": Silent(strength=2)},
    "attack": lambda: {"attack": build_attack(AttackConfig(name="image", attack="image"), Protocol())},
    "seed": lambda: {"protocol": Protocol(seed=1)},
    "rounding": lambda: {"protocol": Protocol(eight_bit=False)},
    "tokenizer": lambda: {"victim": victim_digest(other_tokenizer(), 16)},
    "activation": lambda: {"victim": victim_digest(other_activation(), 16)},
    "weights": lambda: {"victim": victim_digest(other_weight(), 16)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_was_made_from_something_else_is_not_found(what: str, fields: dict[str, Any], tmp_path: Path) -> None:
    before = AdversarialCache(tmp_path, **fields).folder
    assert AdversarialCache(tmp_path, **{**fields, "victim": victim_digest(make("clip"), 16)}).folder == before
    assert AdversarialCache(tmp_path, **{**fields, **OTHERS[what]()}).folder != before


def test_torn_pixels_are_made_again(fields: dict[str, Any], tmp_path: Path) -> None:
    cache = AdversarialCache(tmp_path, **fields)
    gallery = fields["gallery"]
    cache.add(np.arange(4), Attacked(torch.as_tensor(gallery.pixels / 255), gallery.texts))
    assert AdversarialCache(tmp_path, **fields).complete
    pixels = cache.folder / "pixels.npy"
    pixels.write_bytes(pixels.read_bytes()[:100])
    again = AdversarialCache(tmp_path, **fields)
    assert not again.complete
    again.add(np.arange(4), Attacked(torch.as_tensor(gallery.pixels / 255), gallery.texts))
    assert AdversarialCache(tmp_path, **fields).complete
