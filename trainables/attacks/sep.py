"""Sep-Attack: image and captions attacked independently, and combined (Zhang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.image import Pgd
from trainables.attacks.quirks import TEXT_QUIRKS, Quirks
from trainables.attacks.text import BertAttack


@dataclass(frozen=True)
class SepAttack(Attack):
    """`Pgd` on the images and `BertAttack` on the captions, each of which sees nothing of the other.

    Attributes:
        epsilon: radius.
        steps: of the image attack.
        words: changed per caption.
        candidates: substitutes tried per word.
        objective: of both. `cross` leads images from the clean captions and captions from the clean images, `deviation`
            each from itself alone, as the literature's Sep-Attack, which is weaker.
        quirks: of `BertAttack`.
    """

    changes = frozenset({"image", "text"})
    known_quirks = TEXT_QUIRKS
    epsilon: float = 2 / 255
    steps: int = 10
    words: int = 1
    candidates: int = 10
    objective: Literal["cross", "deviation"] = "cross"
    quirks: Quirks = frozenset()

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`."""
        image = batch.once(Pgd(epsilon=self.epsilon, steps=self.steps, objective=self.objective), victim)
        text = BertAttack(words=self.words, candidates=self.candidates, objective=self.objective, quirks=self.quirks)
        return Attacked(image.pixels, batch.once(text, victim).captions)
