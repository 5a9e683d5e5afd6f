"""Sep-Attack: image and captions attacked independently, and combined (Zhang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.image import Pgd
from trainables.attacks.text import BertAttack


@dataclass(frozen=True)
class SepAttack(Attack):
    """`Pgd` on the images against the clean captions, `BertAttack` on the captions against the clean images."""

    changes = frozenset({"image", "text"})
    epsilon: float = 2 / 255
    steps: int = 10
    words: int = 1
    candidates: int = 10

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`."""
        image = batch.once(Pgd(epsilon=self.epsilon, steps=self.steps), victim)
        text = batch.once(BertAttack(words=self.words, candidates=self.candidates), victim)
        return Attacked(image.pixels, text.captions)
