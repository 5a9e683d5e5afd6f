"""The model with its temperature, and the loss of the global batch as its forward pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainables.config import Companion, Point, parts_in_loss
from trainables.errors import InputError
from trainables.models import FusionModel, RetrievalModel, parameters_of, tokenize
from trainables.training.chunks import by_chunks
from trainables.training.exchange import summed, workers
from trainables.training.losses import (
    Features,
    Sides,
    anchor_loss,
    consistency_loss,
    contrastive_loss,
    matching_loss,
    shared,
    similarities,
)

MOMENTUM = 0.995
"""Of the teacher in momentum distillation: what it keeps of itself at a step (Li et al. 2021, section 3.5)."""


class Pairs(NamedTuple):
    """This worker's images with their captions.

    Attributes:
        pixels: (batch, 3, height, width) in [0, 1].
        tokens: (batch x n, length), n captions for each image in turn.
        mask: (batch x n, length).
    """

    pixels: Tensor
    tokens: Tensor
    mask: Tensor


def companion_of(point: Point, model: RetrievalModel) -> Companion:
    """What the loss has beside the contrastive one.

    Raises:
        InputError: matching without fusion.
    """
    fusion = isinstance(model, FusionModel)
    if point.companion == "auto":
        return "matching" if fusion else "anchor"
    if point.companion == "matching" and not fusion:
        raise InputError(f"companion matching: {type(model).__name__} has no fusion transformer to match pairs with")
    return point.companion


class Trainee(nn.Module):
    """What is trained, so that one DDP wrapper sees the model and the temperature.

    With distillation there is a teacher beside the model: at first a copy of it, then its moving average. It is part of
    the state, takes no gradient and stays in eval mode.

    Args:
        model: before training.
        point: what is trained, and by which loss.
        micro_batch: see `TrainingConfig.micro_batch`.

    Raises:
        InputError: the point asks for a part or a companion that the model does not have, or trains only what its loss
            does not look at.
    """

    def __init__(self, model: RetrievalModel, point: Point, micro_batch: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.point = point
        self.micro_batch = micro_batch
        self.companion = companion_of(point, model)
        if point.trainable not in ("all", *parts_in_loss(point, self.companion)):
            raise InputError(
                f"trainable: {point.trainable}, but at contrastive_weight {point.contrastive_weight:g} with companion "
                f"{self.companion} the loss does not depend on that part, so nothing would be trained"
            )
        self.log_temperature = nn.Parameter(
            torch.tensor([math.log(point.temperature)]),  # FSDP takes no scalars
            requires_grad=point.temperature_learned,
        )
        chosen = {id(parameter) for parameter in parameters_of(model, point.trainable)}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)
        distilled = point.distillation > 0 and point.contrastive_weight > 0
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval() if distilled else None

    def train(self, mode: bool = True) -> Trainee:
        """The teacher stays as it is."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self) -> None:
        """After a step: `MOMENTUM * teacher + (1 - MOMENTUM) * model`."""
        if self.teacher is not None:
            for kept, new in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                kept.lerp_(new, 1 - MOMENTUM)

    @property
    def needs_clean(self) -> bool:
        """Whether the loss looks at clean pairs, too."""
        return self.point.pairs == "crossed" or self.companion == "consistency"

    @property
    def needs_original(self) -> bool:
        """Whether the loss, or the attack, looks at the frozen original's embeddings."""
        anchored = self.companion == "anchor" and self.point.contrastive_weight < 1
        return anchored or self.point.attack_objective == "deviation"

    @property
    def nothing_to_learn(self) -> bool:
        """Whether the loss is at its least from the beginning: the anchor alone, on images that nothing attacks."""
        return self.point.contrastive_weight == 0 and self.companion == "anchor" and self.point.epsilon == 0

    def freeze_idle(self, image_pixels: int) -> None:
        """Train nothing that the loss does not depend on: what gets no gradient from two blank images with captions.

        DDP would wait for it, or have to search for it at every step. All workers call this together.

        Args:
            image_pixels: side of the images.
        """
        device = self.log_temperature.device
        tokens, mask = tokenize(self.model, ["a", "b"], 16)
        pairs = Pairs(torch.zeros(2, 3, image_pixels, image_pixels, device=device), tokens.to(device), mask.to(device))
        with torch.no_grad():
            original = self.model.encode_image(pairs.pixels).float()
        positives = torch.ones(2, 2 * workers(), dtype=torch.bool, device=device)
        keys = torch.zeros(2, dtype=torch.int64, device=device)
        loss = self(pairs, pairs, original, (positives, positives), keys)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            parameter.requires_grad_(gradient is not None)

    def clamp_temperature(self) -> None:
        """Keep a learned temperature where the family's own training keeps it, or between there and its start."""
        if self.point.temperature_learned:
            low, high = self.model.temperature_range
            start = self.point.temperature
            with torch.no_grad():
                self.log_temperature.clamp_(math.log(min(low, start)), math.log(max(high, start)))

    def forward(
        self,
        attacked: Pairs,
        clean: Pairs | None,
        original: Tensor | None,
        positives: Sides,
        keys: Tensor,
        alpha: float = 0.0,
    ) -> Tensor:
        """Loss of the global batch, `w * contrastive + (1 - w) * companion`.

        Its value is the same on all workers. Its gradient is a worker's share, which DDP and FSDP take the mean of.

        Args:
            attacked: this worker's adversarial pairs.
            clean: the same pairs before, where `needs_clean`.
            original: (batch, dim), the frozen original's embeddings of the clean images, where `needs_original`.
            positives: bool, which captions of all workers describe this worker's images, and the other way around.
            keys: int64 (batch x n,), the source of each caption's randomness.
            alpha: the teacher's share of the contrastive targets, where there is one.
        """
        share = self._share(attacked, clean, original, positives, keys, alpha)
        return share + (summed(share) / workers() - share).detach()

    def _share(
        self,
        attacked: Pairs,
        clean: Pairs | None,
        original: Tensor | None,
        positives: Sides,
        keys: Tensor,
        alpha: float,
    ) -> Tensor:
        weight, temperature = self.point.contrastive_weight, self.log_temperature.exp()
        if weight == 0 and self.companion == "anchor":
            assert original is not None
            return anchor_loss(self._images(attacked), original)
        matching = self.companion == "matching" and weight < 1
        images, texts, *tokens = by_chunks(partial(_encoded, self.model, matching), self.micro_batch, *attacked)
        features = self._features(self.model, (images, texts), clean)
        loss = images.new_zeros(())
        if weight > 0:
            taught: Iterable[Sides | None] = repeat(None)
            if self.teacher is not None:
                with torch.no_grad():
                    seen = by_chunks(partial(_encoded, self.teacher, False), self.micro_batch, *attacked)
                    taught = self._contrasted(self._features(self.teacher, seen, clean))
            parts = [
                contrastive_loss(part, positives, temperature, teacher, alpha)
                for part, teacher in zip(self._contrasted(features), taught, strict=False)
            ]
            loss = loss + weight * torch.stack(parts).mean()
        if weight == 1:
            return loss
        if self.companion == "anchor":
            assert original is not None
            return loss + (1 - weight) * anchor_loss(images, original)
        scores = similarities(*features[:2])
        if self.companion == "consistency":
            return loss + (1 - weight) * consistency_loss(similarities(*features[2:]), scores, temperature)
        assert isinstance(self.model, FusionModel)
        image_tokens, text_tokens = tokens
        matched = matching_loss(
            self.model,
            image_tokens,
            text_tokens,
            attacked.mask,
            scores,
            positives,
            temperature,
            keys,
            micro_batch=self.micro_batch,
        )
        return loss + (1 - weight) * matched

    def _images(self, pairs: Pairs) -> Tensor:
        (found,) = by_chunks(lambda pixels: (self.model.encode_image(pixels).float(),), self.micro_batch, pairs.pixels)
        return found

    def _features(
        self, model: RetrievalModel, attacked: tuple[Tensor, ...], clean: Pairs | None
    ) -> tuple[Features, ...]:
        """Of attacked images and captions, then of the clean ones where they are needed."""
        found = attacked
        if self.needs_clean:
            assert clean is not None
            found += by_chunks(partial(_encoded, model, False), self.micro_batch, *clean)
        return tuple(shared(features) for features in found)

    def _contrasted(self, features: tuple[Features, ...]) -> Iterator[Sides]:
        """The scores that the contrastive loss is the mean over."""
        images, texts, *clean = features
        if not clean:
            yield similarities(images, texts)
        elif self.companion == "consistency":
            yield similarities(*clean)
        else:
            yield similarities(images, clean[1])
            yield similarities(clean[0], texts)


def _encoded(model: RetrievalModel, fused: bool, pixels: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Features of images and captions, float32; then their tokens, if pairs are to be fused."""
    if not fused:
        return model.encode_image(pixels).float(), model.encode_text(tokens, mask).float()
    assert isinstance(model, FusionModel)
    image_tokens = model.image_tokens(pixels)
    features = model.image_features(image_tokens).float(), model.encode_text(tokens, mask).float()
    return *features, image_tokens, model.text_tokens(tokens, mask)
