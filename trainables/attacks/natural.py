"""Natural perturbations behind the contract of attacks: they know no model, and have no small budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, FilePath

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.substitutes import STOP_WORDS
from trainables.captions import core, put
from trainables.config import AttackConfig
from trainables.data import caption_noise, corruptions

SEVERITIES = (1, 3, 5)


@dataclass(frozen=True)
class Corruption(Attack):
    """Images corrupted as in ImageNet-C, see `trainables.data.corruptions`. Pixels may move without bound.

    Attributes:
        kind: of corruption, such as `fog`.
        severity: 1 to 5.
    """

    changes = frozenset({"image"})
    epsilon = 1.0

    kind: corruptions.Kind
    severity: Annotated[int, Field(ge=1, le=5)] = 3

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """Each image's randomness is its own."""
        images = batch.pixels.permute(0, 2, 3, 1).double().cpu().numpy()
        corrupted = [
            corruptions.corrupt(image, self.kind, self.severity, np.random.default_rng(key))
            for image, key in zip(images, batch.keys.tolist(), strict=True)
        ]
        pixels = torch.as_tensor(np.stack(corrupted), dtype=torch.float32, device=batch.pixels.device)
        return Attacked(pixels.permute(0, 3, 1, 2).contiguous(), batch.captions())


@dataclass(frozen=True)
class CaptionNoise(Attack):
    """Captions spoiled by rule, see `trainables.data.caption_noise`. Words may change without bound.

    The model reads what its family makes of the spoilt caption: ALBEF drops marks that `punctuation` has put in.

    Attributes:
        kind: of noise, such as `keyboard`.
        share: of the characters or words that change; one at least.
        synonyms: file with a word and a synonym of it a line. Without it, `word_synonym` and `word_insert` take what
            the masked language model puts there, which fits the sentence but may mean something else.
    """

    changes = frozenset({"text"})
    words = None

    kind: caption_noise.Kind
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    synonyms: FilePath | None = None

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """Each caption's randomness is its own."""
        captions = []
        for row, key in zip(batch.caption_rows, batch.caption_keys.tolist(), strict=True):
            words = batch.substitutes.words_of(row)
            synonyms: Sequence[Sequence[str]] = (
                batch.substitutes.options_of(row)
                if self.synonyms is None
                else [_synonyms_of(word, self.synonyms) for word in words]
            )
            spoilt = caption_noise.spoil(words, self.kind, self.share, synonyms, np.random.default_rng(key))
            captions.append(batch.caption_text(spoilt))
        return Attacked(batch.pixels, captions)


def _synonyms_of(word: str, file: Path) -> list[str]:
    bare = word[core(word)]
    return [] if bare in STOP_WORDS else [put(synonym, word) for synonym in _read_synonyms(file).get(bare, [])]


_read_synonyms = lru_cache(maxsize=1)(caption_noise.read_synonyms)


def natural_attacks(synonyms: Path | None = None) -> tuple[AttackConfig, ...]:
    """The natural protocol: 17 corruptions at severities 1, 3 and 5, and 13 kinds of caption noise.

    Args:
        synonyms: see `CaptionNoise`.
    """
    by_file = {} if synonyms is None else {"synonyms": str(synonyms)}
    return (
        *(
            AttackConfig(name=f"{kind}-{severity}", attack="corruption", options={"kind": kind, "severity": severity})
            for kind in corruptions.KINDS
            for severity in SEVERITIES
        ),
        *(
            AttackConfig(name=kind, attack="caption-noise", options={"kind": kind, **by_file})
            for kind in caption_noise.KINDS
        ),
    )


NATURAL_ATTACKS = natural_attacks()
