"""Co-Attack: the captions first, then the image away from itself and from them (Zhang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.image import random_start, sign_ascent
from trainables.attacks.quirks import TEXT_QUIRKS, Quirks
from trainables.attacks.text import BertAttack, embedding_divergence


@dataclass(frozen=True)
class CoAttack(Attack):
    """Raises KL(x || x') + 3 KL(t' || x'), averaged over the image's captions t', by PGD.

    The captions t' come from `BertAttack` with the objective `deviation`; KL is between softmaxes of unit embeddings.

    Attributes:
        epsilon: radius.
        steps: of the image attack, each 1.25 epsilon / steps.
        words: changed per caption.
        candidates: substitutes tried per word.
        text_weight: 3 in the paper.
        quirks: of `BertAttack`, `one_sided_start` and `last_caption`.
    """

    changes = frozenset({"image", "text"})
    known_quirks = TEXT_QUIRKS | {"one_sided_start", "last_caption"}
    epsilon: float = 2 / 255
    steps: int = 10
    words: int = 1
    candidates: int = 10
    text_weight: float = 3.0
    quirks: Quirks = frozenset()

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`."""
        text = BertAttack(
            words=self.words, candidates=self.candidates, objective="deviation", quirks=self.quirks & TEXT_QUIRKS
        )
        captions = batch.once(text, victim).captions
        clean, attacked, owner = batch.clean_features(victim), batch.encode(captions), batch.owner
        if "last_caption" in self.quirks:
            last = batch.last_captions()
            attacked, owner = attacked[last], owner[last]
        share = 1 / owner.bincount(minlength=len(clean)).to(clean.dtype)

        def objective(pixels: Tensor, _: int) -> Tensor:
            features = victim.encode_image(pixels)
            from_text = (embedding_divergence(attacked, features[owner]) * share[owner]).float()
            zero = features.new_zeros(len(features))
            return embedding_divergence(clean, features).float() + self.text_weight * zero.index_add(
                0, owner, from_text
            )

        pixels = sign_ascent(
            batch.pixels,
            objective,
            random_start(batch.pixels, self.epsilon, batch.keys, one_sided="one_sided_start" in self.quirks),
            epsilon=self.epsilon,
            step_size=1.25 * self.epsilon / self.steps,
            steps=self.steps,
        )
        return Attacked(pixels, captions)
