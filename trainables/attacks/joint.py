"""Attacks on images and captions that answer each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainables.attacks.apgd import apgd
from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.image import Pgd, random_start
from trainables.attacks.lexicon import Captions
from trainables.attacks.noise import step_keys
from trainables.attacks.rivals import Direction, Loss, Rivals
from trainables.attacks.search import TextSearch


@dataclass(frozen=True)
class Both(Attack):
    """`Pgd` on the images, then `TextSearch` against the attacked images: strong for what it costs.

    Attributes:
        epsilon: radius.
        steps: of the image attack.
        words: changed per caption.
        candidates: substitutes tried per word.
    """

    changes = frozenset({"image", "text"})
    epsilon: float = 2 / 255
    steps: int = 10
    words: int = 1
    candidates: int = 10

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`. The captions that are tried are those of `TextSearch` alone, so they are encoded already."""
        pixels = batch.once(Pgd(epsilon=self.epsilon, steps=self.steps), victim).pixels
        with torch.no_grad():
            features = victim.encode_image(pixels)
        search = TextSearch(words=self.words, candidates=self.candidates)
        return Attacked(pixels, search.captions(victim, batch, features))


TOLERANCE = 1e-4
"""Of the loss: who gains less from an answer has converged."""


@dataclass(frozen=True)
class Joint(Attack):
    """Best responses to convergence: captions against the current images, images against the current captions.

    `search_words` starts from the clean captions each time, `apgd` from the current images. An image and its captions
    keep an answer only if their loss rises, so it converges; whoever gains no more is done.

    Attributes:
        epsilon: radius.
        words: changed per caption.
        candidates: substitutes tried per word.
        steps: of each image answer after the first, which has `first_steps`.
        first_steps: of the image answer to the clean captions.
        rounds: answers at most.
        restarts: the first begins at the clean images, the others at random. The highest loss counts, image by image.
        loss: of image answers, see `rivals.Loss`; of captions too, but where images are the queries only, and each
            caption can do no more than to be unlike its image.
        direction: which queries are to lose.
    """

    changes = frozenset({"image", "text"})
    epsilon: float = 2 / 255
    words: int = 1
    candidates: int = 10
    steps: int = 20
    first_steps: int = 50
    rounds: int = 10
    restarts: int = 1
    loss: Loss = "cross"
    direction: Direction = "both"

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`."""
        found = [self._converged(victim, batch, restart) for restart in range(self.restarts)]
        pixels, rows, value = found[0]
        for other_pixels, other_rows, other_value in found[1:]:
            better = other_value > value
            pixels = torch.where(better.view(-1, 1, 1, 1), other_pixels, pixels)
            rows = torch.where(better[batch.owner, None], other_rows, rows)
            value = torch.where(better, other_value, value)
        return Attacked(pixels, Captions(rows, batch.captions().lexicon))

    def _converged(self, victim: Victim, whole: Batch, restart: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, the captions' words, and the loss of each image."""
        pixels = whole.pixels.clone()
        if restart:
            pixels = random_start(pixels, self.epsilon, step_keys(whole.keys, restart))
        rows = whole.captions().rows.clone()
        value = torch.full(whole.labels.shape, -torch.inf, device=pixels.device)
        batch, active = whole, torch.arange(len(pixels), device=pixels.device)
        for answer in range(self.rounds):
            if answer:
                with torch.no_grad():
                    features = victim.encode_image(pixels[active])
                captions = self._search.captions(victim, batch, features)
            else:
                captions = batch.captions()
            found, reached = apgd(
                batch.pixels,
                Rivals(victim, batch, self.loss).of_images(batch.encode(captions), self.direction),
                pixels[active],
                epsilon=self.epsilon,
                steps=self.steps if answer else self.first_steps,
            )
            better = reached > value[active] + TOLERANCE
            active, words = active[better], captions.rows[better[batch.owner]]
            if len(active) == 0:
                break
            pixels[active], value[active] = found[better], reached[better]
            rows[torch.isin(whole.owner, active), : words.shape[1]] = words
            batch = whole.take(active)
        return pixels, rows, value

    @property
    def _search(self) -> TextSearch:
        return TextSearch(self.words, self.candidates, "cosine" if self.direction == "tr" else self.loss)
