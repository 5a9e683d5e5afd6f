"""Co-Attack: the captions first, then the image away from itself and from them (Zhang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.image import random_start, sign_ascent
from trainables.attacks.text import BertAttack, embedding_divergence


@dataclass(frozen=True)
class CoAttack(Attack):
    """Raises KL(x' || x) + 3 KL(x' || t'), averaged over the image's captions t', by PGD.

    The captions t' come from `BertAttack` with the objective `deviation`; KL is between softmaxes of unit embeddings.

    Attributes:
        epsilon: radius.
        steps: of the image attack, each 1.25 epsilon / steps.
        words: changed per caption.
        candidates: substitutes tried per word.
        text_weight: 3 in the paper.
        compat: with the quirks of the published code: those of `BertAttack`, a start that only goes upwards, and images
            attacked once per pair, of which the last pair's version is kept, so that only the last caption counts.
    """

    changes = frozenset({"image", "text"})
    epsilon: float = 2 / 255
    steps: int = 10
    words: int = 1
    candidates: int = 10
    text_weight: float = 3.0
    compat: bool = False

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`."""
        text = BertAttack(words=self.words, candidates=self.candidates, objective="deviation", compat=self.compat)
        captions = batch.once(text, victim).captions
        clean, attacked, owner = batch.clean_features(victim), batch.encode(captions), batch.owner
        if self.compat:
            last = batch.last_captions()
            attacked, owner = attacked[last], owner[last]
        share = 1 / owner.bincount(minlength=len(clean)).to(clean.dtype)

        def objective(pixels: Tensor, _: int) -> Tensor:
            features = victim.encode_image(pixels)
            from_text = (embedding_divergence(features[owner], attacked) * share[owner]).float()
            zero = features.new_zeros(len(features))
            return embedding_divergence(features, clean).float() + self.text_weight * zero.index_add(
                0, owner, from_text
            )

        pixels = sign_ascent(
            batch.pixels,
            objective,
            random_start(batch.pixels, self.epsilon, batch.keys, one_sided=self.compat),
            epsilon=self.epsilon,
            step_size=1.25 * self.epsilon / self.steps,
            steps=self.steps,
        )
        return Attacked(pixels, captions)
