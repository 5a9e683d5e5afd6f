"""An attack on similarity and matching together: through both encoders and the fusion transformer to the pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.encoding import tokens_of
from trainables.attacks.image import input_gradient, random_start, sign_ascent
from trainables.attacks.lexicon import Captions
from trainables.attacks.rivals import Rivals
from trainables.attacks.search import best_changes, search_words
from trainables.errors import InputError
from trainables.models import FusionModel


@dataclass(frozen=True)
class ItmAttack(Attack):
    """PGD against the similarity and the matching of an image with its captions, then the words that hurt both.

    The published attacks stop at the encoders' embeddings, so that what re-ranks by matching only meets an attack on
    something else. Only a model with fusion can be attacked. At the start the two gradients are given the same mean
    magnitude, image by image, so neither head can hide behind the scale of its scores.

    Attributes:
        epsilon: radius.
        steps: of the image attack, each 2.5 epsilon / steps.
        words: changed per caption.
        candidates: substitutes tried per word.
        shortlist: of the changes of a caption that hurt similarity most, so many are matched, and the worst is taken.
    """

    changes = frozenset({"image", "text"})
    epsilon: float = 2 / 255
    steps: int = 10
    words: int = 1
    candidates: int = 10
    shortlist: int = 5

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
        pixels = self._pixels(model, victim, batch)
        return Attacked(pixels, self._captions(model, victim, batch, pixels))

    def _pixels(self, model: FusionModel, victim: Victim, batch: Batch) -> Tensor:
        if self.epsilon == 0:
            return batch.pixels
        captions = batch.captions()
        dissimilar = Rivals(victim, batch, "margin").of_features(batch.encode(captions), "both")
        matched = Matching(model, batch, victim.max_tokens, captions)

        def losses(pixels: Tensor) -> tuple[Tensor, Tensor]:
            tokens = model.image_tokens(pixels)
            features = F.normalize(model.image_features(tokens).float(), dim=-1)
            return dissimilar(features), -matched(tokens).sum(1)

        start = random_start(batch.pixels, self.epsilon, batch.keys)
        unlike, apart = (
            input_gradient(start, objective).abs().mean((1, 2, 3))
            for objective in (lambda pixels, _: losses(pixels)[0], lambda pixels, _: losses(pixels)[1])
        )
        share = torch.where((unlike > 0) & (apart > 0), unlike / apart, 1.0)

        def together(pixels: Tensor, _: int) -> Tensor:
            similarity, matching = losses(pixels)
            return similarity + share * matching

        return sign_ascent(
            batch.pixels,
            together,
            start,
            epsilon=self.epsilon,
            step_size=2.5 * self.epsilon / self.steps,
            steps=self.steps,
        )

    @torch.no_grad()
    def _captions(self, model: FusionModel, victim: Victim, batch: Batch, pixels: Tensor) -> Captions:
        """Of the best changes by similarity the one that matches least; more words than one are changed before."""
        if self.words == 0:
            return batch.captions()
        tokens = model.image_tokens(pixels)
        features = F.normalize(model.image_features(tokens).float(), dim=-1)
        candidates = batch.candidates(count=self.candidates)
        misfit = Rivals(victim, batch, "cross").misfit(features)
        before, _ = search_words(batch.encode, candidates, misfit, words=self.words - 1)
        best, lowest = before.rows, torch.full((len(before),), torch.inf, device=pixels.device)
        for rows in (before.rows, *best_changes(batch.encode, candidates, misfit, before.rows, self.shortlist)):
            matched = Matching(model, batch, victim.max_tokens, Captions(rows, before.lexicon))
            logits = matched(tokens).flatten()[matched.first]
            lower = logits < lowest
            best, lowest = torch.where(lower[:, None], rows, best), torch.where(lower, logits, lowest)
        return Captions(best, before.lexicon)


class Matching:
    """The matching logits of a batch's images with their captions.

    Attributes:
        first: int64 (captions,), where in the flattened logits each caption's is.
    """

    def __init__(self, model: FusionModel, batch: Batch, max_tokens: int, captions: Captions) -> None:
        rows, self._own = _by_image(batch.owner, len(batch.pixels))
        tokens, mask = tokens_of(model, captions, max_tokens, batch.pixels.device)
        self._model, self._mask = model, mask[rows]
        with torch.no_grad():
            self._text_tokens = model.text_tokens(tokens[rows], self._mask)
        self.first = self._own.flatten().nonzero()[:, 0]

    def __call__(self, image_tokens: Tensor) -> Tensor:
        """(images, image tokens, width) -> logits (images, most captions of an image), 0 for what only fills up."""
        logits = self._model.itm_logits(image_tokens, self._text_tokens, self._mask)[:, 1].float()
        return logits.view_as(self._own) * self._own


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
