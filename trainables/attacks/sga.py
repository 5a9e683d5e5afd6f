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

    Copies are clamped to [0, 1] in between, as published; what the way back adds may leave it by a little.

    Args:
        pixels: (batch, 3, height, width).
        keys: int64 (batch,), of this step.
    """
    copies, size = [pixels], tuple(pixels.shape[-2:])
    with full_precision():
        for index, scale in enumerate(SCALES):
            image = pixels + SCALE_NOISE * normal(step_keys(keys, index + 1), tuple(pixels.shape[1:]))
            others = tuple(max(1, int(scale * side)) for side in size)
            copies.append(_resized(_resized(image, others).clamp(0, 1), size))
    return torch.cat(copies)


def _resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    tall, wide = (bicubic(*sides, image.device) for sides in zip(image.shape[-2:], size, strict=True))
    return tall @ image @ wide.T


def lone_objective(victim: Victim, batch: Batch, captions: Tensor) -> Objective:
    """Minus the similarity of an image to all its captions, summed. Takes the batch's images once or several times.

    Args:
        victim: its image encoder is read.
        batch: for owners.
        captions: (captions, dim) L2-normalised, adversarial.
    """
    sums = captions.new_zeros(len(batch.pixels), captions.shape[1]).index_add(0, batch.owner, captions)

    def objective(pixels: Tensor, _: int) -> Tensor:
        features = victim.encode_image(pixels)
        return -(features.view(-1, *sums.shape) * sums).sum(2).flatten()

    return objective


def set_objective(victim: Victim, batch: Batch, captions: Tensor) -> Objective:
    """`lone_objective` of an image and its scaled copies, summed: SGA's image loss.

    Args:
        victim: see `lone_objective`.
        batch: for owners and randomness.
        captions: see `lone_objective`.
    """
    alone = lone_objective(victim, batch, captions)

    def objective(pixels: Tensor, step: int) -> Tensor:
        copies = scaled_copies(pixels, step_keys(batch.keys, 16 * (step + 1)))
        return alone(copies, step).view(-1, len(pixels)).sum(0)

    return objective


@lru_cache(maxsize=1)
def mixture_table() -> tuple[Tensor, Tensor]:
    """How DRA's code weighs a mixture: of the current, the clean and the previous image, in hundredths.

    `n1` is uniform in 1..100 and `n2` in 1..100 - n1; the previous image has the rest, and both are drawn again where
    that is nothing, but from 99 on `n1` is 98 and the others 1.

    Returns:
        float64 (mixtures,) the probability of each and those before, and float32 (mixtures, 3) its weights.
    """
    pairs = [(first, second) for first in range(1, 99) for second in range(1, 100 - first)]
    chances = [1 / (100 - first) + 2 * ((first, second) == (98, 1)) for first, second in pairs]
    weights = torch.tensor([(first, second, 100 - first - second) for first, second in pairs]) / 100
    sums = torch.tensor(chances, dtype=torch.float64).cumsum(0)
    return sums / sums[-1], weights


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
        attacked, guide = self.images(victim, batch, supervision)
        return Attacked(attacked, self._captions(batch, guide))

    def _captions(self, batch: Batch, image_features: Tensor) -> Captions:
        text = BertAttack(words=self.words, candidates=self.candidates, quirks=self.quirks & TEXT_QUIRKS)
        return text.captions(batch, image_features)

    def images(self, victim: Victim, batch: Batch, captions: Tensor) -> tuple[Tensor, Tensor]:
        """The images led away from (captions, dim), and the features (images, dim) that the captions then are."""
        attacked = sign_ascent(
            batch.pixels,
            set_objective(victim, batch, captions),
            random_start(batch.pixels, self.epsilon, batch.keys),
            epsilon=self.epsilon,
            step_size=STEP_SHARE * self.epsilon,
            steps=self.steps,
        )
        with torch.no_grad():
            return attacked, victim.encode_image(attacked)


@dataclass(frozen=True)
class Dra(Sga):
    """SGA whose image gradient is taken at the worst of some mixtures of the current, clean and last image.

    From the second step on, random mixtures are tried (`mixture_table`): the sign of the gradient at each, without
    scaled copies, is a step from the current image, and the mixture whose step reaches the highest loss gives SGA's
    gradient. Each image has mixtures of its own; the published code draws and chooses them once a batch, so ours is
    what it does with one image a batch.

    Attributes:
        mixtures: tried per step.
        quirks: of `Sga`, and `free_look_ahead`.
    """

    known_quirks = Sga.known_quirks | {"free_look_ahead"}

    mixtures: int = 5

    WEIGHTS = (0.6, 0.2, 0.2)
    """Of the clean image, the attacked one, and the one before the last step, in the last caption step."""

    def images(self, victim: Victim, batch: Batch, captions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Sga.images`."""
        objective, alone = set_objective(victim, batch, captions), lone_objective(victim, batch, captions)
        step_size = STEP_SHARE * self.epsilon
        low, high = (batch.pixels - self.epsilon).clamp(min=0), (batch.pixels + self.epsilon).clamp(max=1)
        current = random_start(batch.pixels, self.epsilon, batch.keys)
        before = current
        for step in range(self.steps):
            place = current if step == 0 else self._worst(batch, alone, current, before, step, step_size)
            direction = input_gradient(place, objective, step).sign()
            before, current = current, torch.clamp(current + step_size * direction, low, high)
        with torch.no_grad():
            seen = batch.clean_features(victim), victim.encode_image(current), victim.encode_image(before)
        return current, sum((w * f for w, f in zip(self.WEIGHTS, seen, strict=True)), start=torch.zeros_like(seen[0]))

    def _worst(
        self, batch: Batch, alone: Objective, current: Tensor, before: Tensor, step: int, step_size: float
    ) -> Tensor:
        reached, table = (part.to(current.device) for part in mixture_table())
        draws = uniform(step_keys(batch.keys, 1000 + step), (self.mixtures,)).double()
        shares = table[torch.searchsorted(reached, draws, right=True)].transpose(0, 1)[..., None, None, None]
        mixtures = shares[:, :, 0] * current + shares[:, :, 1] * batch.pixels + shares[:, :, 2] * before
        ahead = current + step_size * input_gradient(mixtures.flatten(0, 1), alone).sign().view_as(mixtures)
        if "free_look_ahead" not in self.quirks:
            ahead = ahead.clamp(0, 1)
        with torch.no_grad():
            losses = alone(ahead.flatten(0, 1), 0).view(self.mixtures, -1)
        return mixtures[losses.argmax(0), torch.arange(len(current), device=current.device)]
