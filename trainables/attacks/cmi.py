"""CMI-Attack: captions guided by a perturbed start, images with momentum from the captions (Fu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.image import input_gradient, random_start, sign_ascent, unit_gradient
from trainables.attacks.noise import step_keys
from trainables.attacks.quirks import TEXT_QUIRKS, Quirks
from trainables.attacks.sga import STEP_SHARE, set_objective
from trainables.attacks.text import BertAttack


@dataclass(frozen=True)
class CmiAttack(Attack):
    """SGA's losses; the captions are attacked once, and their gradient on the image starts the momentum.

    Substitutes are the masked language model's, the published code's way for words its table of word vectors does not
    know.

    Attributes:
        epsilon: radius.
        steps: of the image attack, each a quarter of epsilon.
        words: changed per caption.
        candidates: substitutes tried per word.
        momentum: 0.9 in the paper.
        quirks: of `BertAttack`.
    """

    changes = frozenset({"image", "text"})
    known_quirks = TEXT_QUIRKS
    epsilon: float = 2 / 255
    steps: int = 10
    words: int = 1
    candidates: int = 10
    momentum: float = 0.9
    quirks: Quirks = frozenset()

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`."""
        start = random_start(batch.pixels, self.epsilon, batch.keys)
        with torch.no_grad():
            guide = victim.encode_image(start)
        text = BertAttack(words=self.words, candidates=self.candidates, quirks=self.quirks)
        captions = text.captions(batch, guide)
        objective = set_objective(victim, batch, batch.encode(captions))
        pixels = sign_ascent(
            batch.pixels,
            objective,
            random_start(batch.pixels, self.epsilon, step_keys(batch.keys, 1)),
            epsilon=self.epsilon,
            step_size=STEP_SHARE * self.epsilon,
            steps=self.steps,
            momentum=self.momentum,
            velocity=unit_gradient(input_gradient(start, objective, self.steps)),
        )
        return Attacked(pixels, captions)
