"""SGA: set-level guidance over captions and image scales (Lu et al. 2023), and DRA on top of it (Gao et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.encoding import encode_captions
from trainables.attacks.image import Objective, input_gradient, random_start, sign_ascent
from trainables.attacks.lexicon import Captions
from trainables.attacks.noise import normal, step_keys, uniform
from trainables.attacks.quirks import TEXT_QUIRKS, Quirks
from trainables.attacks.text import BertAttack
from trainables.precision import full_precision

SCALES = (0.5, 0.75, 1.25, 1.5)
"""Of the copies beside the image itself."""

SCALE_NOISE = 0.05
"""Standard deviation of what is added to a copy before it is resized."""

STEP_SHARE = 0.25
"""Of epsilon, an image step: 0.5/255 at 2/255."""


@lru_cache(maxsize=64)
def bicubic(size: int, other: int, device: torch.device) -> Tensor:
    """The matrix (other, size) that resizes a column of pixels as `torch.nn.functional.interpolate` does.

    Resizing by two small matrix products gives the same as that function, and its backward pass costs a fraction.
    """
    return F.interpolate(torch.eye(size, device=device)[None, None], (other, size), mode="bicubic")[0, 0]


def scaled_copies(pixels: Tensor, keys: Tensor) -> Tensor:
    """The images and their noisy copies, resized by each of `SCALES` and back, (5 x batch, 3, height, width).

    Args:
        pixels: (batch, 3, height, width).
        keys: int64 (batch,), of this step.
    """
    copies, size = [pixels], tuple(pixels.shape[-2:])
    with full_precision():
        for index, scale in enumerate(SCALES):
            image = pixels + SCALE_NOISE * normal(step_keys(keys, index + 1), tuple(pixels.shape[1:]))
            others = tuple(max(1, int(scale * side)) for side in size)
            for before, after in ((size, others), (others, size)):
                tall, wide = (bicubic(*sides, pixels.device) for sides in zip(before, after, strict=True))
                image = (tall @ image @ wide.T).clamp(0, 1)
            copies.append(image)
    return torch.cat(copies)


def set_objective(victim: Victim, batch: Batch, captions: Tensor) -> Objective:
    """Minus the similarity of every copy of an image to every caption of it, summed: SGA's image loss.

    Args:
        victim: its image encoder is read.
        batch: for owners and randomness.
        captions: (captions, dim) L2-normalised, adversarial.
    """
    images = len(batch.pixels)
    sums = captions.new_zeros(images, captions.shape[1]).index_add(0, batch.owner, captions)

    def objective(pixels: Tensor, step: int) -> Tensor:
        features = victim.encode_image(scaled_copies(pixels, step_keys(batch.keys, 16 * (step + 1))))
        return -(features.view(-1, images, features.shape[1]) * sums).sum((0, 2))

    return objective


@dataclass(frozen=True)
class Sga(Attack):
    """Captions against the clean images, images against those captions, then the clean captions against the images.

    Attributes:
        epsilon: radius.
        steps: of the image attack, each a quarter of epsilon.
        words: changed per caption.
        candidates: substitutes tried per word.
        quirks: of `BertAttack`, and `supervision_30_tokens`.
    """

    changes = frozenset({"image", "text"})
    known_quirks: ClassVar[Quirks] = TEXT_QUIRKS | {"supervision_30_tokens"}
    epsilon: float = 2 / 255
    steps: int = 10
    words: int = 1
    candidates: int = 10
    quirks: Quirks = frozenset()

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`."""
        clean = batch.clean_features(victim)
        captions = self._captions(batch, clean)
        if "supervision_30_tokens" in self.quirks:
            supervision = encode_captions(victim.model, captions, min(30, victim.max_tokens), batch.pixels.device)
        else:
            supervision = batch.encode(captions)
        objective = set_objective(victim, batch, supervision)
        attacked, guide = self.images(victim, batch, objective)
        return Attacked(attacked, self._captions(batch, guide))

    def _captions(self, batch: Batch, image_features: Tensor) -> Captions:
        text = BertAttack(words=self.words, candidates=self.candidates, quirks=self.quirks & TEXT_QUIRKS)
        return text.captions(batch, image_features)

    def images(self, victim: Victim, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor]:
        """The image step, and the features (images, dim) that the last caption step leads away from."""
        attacked = sign_ascent(
            batch.pixels,
            objective,
            random_start(batch.pixels, self.epsilon, batch.keys),
            epsilon=self.epsilon,
            step_size=STEP_SHARE * self.epsilon,
            steps=self.steps,
        )
        with torch.no_grad():
            return attacked, victim.encode_image(attacked)


@dataclass(frozen=True)
class Dra(Sga):
    """SGA whose image gradient is taken at the worst of some mixtures of the clean, last and current image.

    From the second step on, each of `mixtures` random convex combinations looks one sign step ahead, and the one with
    the highest loss there gives the gradient.

    Attributes:
        mixtures: tried per step.
        quirks: of `Sga`, and `free_look_ahead`.
    """

    known_quirks = Sga.known_quirks | {"free_look_ahead"}

    mixtures: int = 5

    WEIGHTS = (0.6, 0.2, 0.2)
    """Of the clean image, the attacked one, and the one before the last step, in the last caption step."""

    def images(self, victim: Victim, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor]:
        """See `Sga.images`."""
        step_size = STEP_SHARE * self.epsilon
        low, high = (batch.pixels - self.epsilon).clamp(min=0), (batch.pixels + self.epsilon).clamp(max=1)
        current = random_start(batch.pixels, self.epsilon, batch.keys)
        before = current
        for step in range(self.steps):
            place = current if step == 0 else self._worst(batch, objective, current, before, step, step_size)
            direction = input_gradient(place, objective, step).sign()
            before, current = current, torch.clamp(current + step_size * direction, low, high)
        with torch.no_grad():
            seen = batch.clean_features(victim), victim.encode_image(current), victim.encode_image(before)
        return current, sum((w * f for w, f in zip(self.WEIGHTS, seen, strict=True)), start=torch.zeros_like(seen[0]))

    def _worst(
        self, batch: Batch, objective: Objective, current: Tensor, before: Tensor, step: int, step_size: float
    ) -> Tensor:
        draws = -torch.log1p(-uniform(step_keys(batch.keys, 1000 + step), (self.mixtures, 3)))
        weights = (draws / draws.sum(2, keepdim=True)).view(len(current), self.mixtures, 3, 1, 1, 1)
        chosen, highest = current, torch.full((len(current),), -torch.inf, device=current.device)
        for index in range(self.mixtures):
            share = weights[:, index]
            mixture = share[:, 0] * current + share[:, 1] * batch.pixels + share[:, 2] * before
            ahead = mixture + step_size * input_gradient(mixture, objective, step).sign()
            if "free_look_ahead" not in self.quirks:
                ahead = ahead.clamp(0, 1)
            with torch.no_grad():
                loss = objective(ahead, step)
            higher = loss > highest
            chosen = torch.where(higher.view(-1, 1, 1, 1), mixture, chosen)
            highest = torch.where(higher, loss, highest)
        return chosen
