"""The model with its temperature, and the loss of the global batch as its forward pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainables.config import Companion, Point, parts_in_loss
from trainables.errors import InputError
from trainables.models import FusionModel, RetrievalModel, parameters_of
from trainables.training.losses import (
    anchor_loss,
    consistency_loss,
    contrastive_loss,
    gather_with_gradient,
    matching_loss,
    similarity,
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

    Raises:
        InputError: the point asks for a part or a companion that the model does not have, or trains only what its loss
            does not look at.
    """

    def __init__(self, model: RetrievalModel, point: Point) -> None:
        super().__init__()
        self.model = model
        self.point = point
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

    @property
    def leaves_parts_out(self) -> bool:
        """Whether some trained parameters may not take part in the loss, which DDP has to know."""
        idle_fusion = isinstance(self.model, FusionModel) and self.companion != "matching"
        return idle_fusion or self.point.contrastive_weight in (0, 1)

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
        positives: Tensor,
        keys: Tensor,
        alpha: float = 0.0,
    ) -> Tensor:
        """Loss of the global batch, `w * contrastive + (1 - w) * companion`, the same on all workers.

        Args:
            attacked: this worker's adversarial pairs.
            clean: the same pairs before, where `needs_clean`.
            original: (batch, dim), the frozen original's embeddings of the clean images, where `needs_original`.
            positives: bool (world x batch, world x batch x n).
            keys: int64 (batch x n,), the source of each caption's randomness.
            alpha: the teacher's share of the contrastive targets, where there is one.
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
        features = self._features(self.model, attacked, clean, gather_with_gradient(own))
        scores = similarity(features[0], features[1])
        if weight > 0:
            against = list(self._contrasted(features))
            taught: Sequence[Tensor | None] = [None] * len(against)
            if self.teacher is not None:
                with torch.no_grad():
                    seen = gather_with_gradient(self.teacher.encode_image(attacked.pixels).float())
                    taught = list(self._contrasted(self._features(self.teacher, attacked, clean, seen)))
            parts = [
                contrastive_loss(part, positives, temperature, teacher, alpha)
                for part, teacher in zip(against, taught, strict=True)
            ]
            loss = loss + weight * torch.stack(parts).mean()
        if self.companion == "consistency" and weight < 1:
            loss = loss + (1 - weight) * consistency_loss(similarity(*features[2:]), scores, temperature)
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

    def _features(
        self, model: RetrievalModel, attacked: Pairs, clean: Pairs | None, images: Tensor
    ) -> tuple[Tensor, ...]:
        """All workers': the attacked `images`, as given, and captions; then the clean ones where they are needed."""
        found = [images, _texts(model, attacked)]
        if self.needs_clean:
            assert clean is not None
            found += [gather_with_gradient(model.encode_image(clean.pixels).float()), _texts(model, clean)]
        return tuple(found)

    def _contrasted(self, features: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """The scores that the contrastive loss is the mean over."""
        images, texts, *clean = features
        if not clean:
            yield similarity(images, texts)
        elif self.companion == "consistency":
            yield similarity(*clean)
        else:
            yield similarity(images, clean[1])
            yield similarity(clean[0], texts)


def _texts(model: RetrievalModel, pairs: Pairs) -> Tensor:
    return gather_with_gradient(model.encode_text(pairs.tokens, pairs.mask).float())
