"""The model with its temperature, and the loss of the global batch as its forward pass."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainables.command import InputError
from trainables.config import Point
from trainables.losses import (
    anchor_loss,
    consistency_loss,
    contrastive_loss,
    gather_with_gradient,
    matching_loss,
    similarity,
)
from trainables.models import FusionModel, RetrievalModel, parameters_of

Companion = Literal["anchor", "matching", "consistency"]


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

    Raises:
        InputError: the point asks for a part or a companion that the model does not have.
    """

    def __init__(self, model: RetrievalModel, point: Point) -> None:
        super().__init__()
        self.model = model
        self.point = point
        self.companion = companion_of(point, model)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(point.temperature)), requires_grad=point.temperature_learned
        )
        chosen = {id(parameter) for parameter in parameters_of(model, point.trainable)}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)

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
    def leaves_parts_out(self) -> bool:
        """Whether some trained parameters may not take part in the loss, which DDP has to know."""
        idle_fusion = isinstance(self.model, FusionModel) and self.companion != "matching"
        return idle_fusion or self.point.contrastive_weight in (0, 1)

    def clamp_temperature(self) -> None:
        """Keep a learned temperature where the family's own training keeps it."""
        if self.point.temperature_learned:
            low, high = self.model.temperature_range
            with torch.no_grad():
                self.log_temperature.clamp_(math.log(low), math.log(high))

    def forward(
        self, attacked: Pairs, clean: Pairs | None, original: Tensor | None, positives: Tensor, keys: Tensor
    ) -> Tensor:
        """Loss of the global batch, `w * contrastive + (1 - w) * companion`, the same on all workers.

        Args:
            attacked: this worker's adversarial pairs.
            clean: the same pairs before, where `needs_clean`.
            original: (batch, dim), the frozen original's embeddings of the clean images, where `needs_original`.
            positives: bool (world x batch, world x batch x n).
            keys: int64 (batch x n,), the source of each caption's randomness.
        """
        weight, temperature = self.point.contrastive_weight, self.log_temperature.exp()
        matching = self.companion == "matching" and weight < 1
        image_tokens = None
        if matching:
            assert isinstance(self.model, FusionModel)
            image_tokens = self.model.image_tokens(attacked.pixels)
            own = self.model.image_features(image_tokens).float()
        else:
            own = self.model.encode_image(attacked.pixels).float()
        loss = own.new_zeros(())
        if weight < 1 and self.companion == "anchor":
            assert original is not None
            loss = (1 - weight) * anchor_loss(gather_with_gradient(own), gather_with_gradient(original))
            if weight == 0:
                return loss
        images = gather_with_gradient(own)
        texts = self._texts(attacked)
        scores = similarity(images, texts)
        clean_scores = None
        if self.needs_clean:
            assert clean is not None
            clean_images = gather_with_gradient(self.model.encode_image(clean.pixels).float())
            clean_texts = self._texts(clean)
            clean_scores = similarity(clean_images, clean_texts)
        if weight > 0:
            if clean_scores is not None and self.companion == "consistency":
                against = [clean_scores]
            elif clean_scores is not None:
                against = [similarity(images, clean_texts), similarity(clean_images, texts)]
            else:
                against = [scores]
            parts = [contrastive_loss(part, positives, temperature) for part in against]
            loss = loss + weight * torch.stack(parts).mean()
        if clean_scores is not None and self.companion == "consistency" and weight < 1:
            loss = loss + (1 - weight) * consistency_loss(clean_scores, scores, temperature)
        if image_tokens is not None:
            assert isinstance(self.model, FusionModel)
            text_tokens = self.model.text_tokens(attacked.tokens, attacked.mask)
            matched = matching_loss(
                self.model,
                image_tokens,
                text_tokens,
                attacked.mask,
                scores.detach() / temperature.detach(),
                positives,
                keys,
            )
            loss = loss + (1 - weight) * matched
        return loss

    def _texts(self, pairs: Pairs) -> Tensor:
        return gather_with_gradient(self.model.encode_text(pairs.tokens, pairs.mask).float())
