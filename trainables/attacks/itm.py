"""An attack on the matching score itself: through the fusion transformer to the pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.encoding import tokens_of
from trainables.attacks.image import random_start, sign_ascent
from trainables.attacks.text import BertAttack
from trainables.errors import InputError
from trainables.models import FusionModel


@dataclass(frozen=True)
class ItmAttack(Attack):
    """The captions first, then PGD that lowers the ITM logit of the image with each of its attacked captions.

    The published attacks stop at the encoders' embeddings, so that what re-ranks by matching only meets an attack on
    something else. Only a model with fusion can be attacked. The captions come from `BertAttack`.

    Attributes:
        epsilon: radius.
        steps: of the image attack, each 1.25 epsilon / steps.
        words: changed per caption.
        candidates: substitutes tried per word.
    """

    changes = frozenset({"image", "text"})
    epsilon: float = 2 / 255
    steps: int = 10
    words: int = 1
    candidates: int = 10

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`.

        Raises:
            InputError: the model has no fusion.
        """
        model = victim.model
        if not isinstance(model, FusionModel):
            raise InputError(
                f"the attack itm needs a model that matches images with captions (ALBEF, BLIP); "
                f"{type(model).__name__} has no such head"
            )
        captions = batch.once(BertAttack(words=self.words, candidates=self.candidates), victim).captions
        rows, own = _by_image(batch.owner, len(batch.pixels))
        device = batch.pixels.device
        tokens, mask = (part[rows] for part in tokens_of(model, captions, victim.max_tokens, device))
        with torch.no_grad():
            text_tokens = model.text_tokens(tokens, mask)

        def objective(pixels: Tensor, _: int) -> Tensor:
            logits = model.itm_logits(model.image_tokens(pixels), text_tokens, mask)[:, 1].float()
            return -(logits.view_as(own) * own).sum(1)

        pixels = sign_ascent(
            batch.pixels,
            objective,
            random_start(batch.pixels, self.epsilon, batch.keys),
            epsilon=self.epsilon,
            step_size=1.25 * self.epsilon / self.steps,
            steps=self.steps,
        )
        return Attacked(pixels, captions)


def _by_image(owner: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """As many captions for each image: rows (images x n,), and weights (images, n), 0 for what only fills up.

    Args:
        owner: int64 (captions,), rising; every image has a caption.
        images: of the batch.
    """
    counts = owner.bincount(minlength=images)
    place = torch.arange(int(counts.max()), device=owner.device)
    own = place < counts[:, None]
    rows = (counts.cumsum(0) - counts)[:, None] + torch.minimum(place, counts[:, None] - 1)
    return rows.flatten(), own.float()
