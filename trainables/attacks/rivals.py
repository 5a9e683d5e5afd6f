"""The retrieval loss: how far wrong answers of the clean gallery stand ahead of the right ones.

Attacks raise it. It reads similarities only, in units of their own spread over the gallery, so that no temperature can
hide its gradient. Equal captions are right answers for each other's images, as in `evaluation.retrieval`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.contract import Batch, Victim
from trainables.attacks.image import Objective
from trainables.precision import inner_products

Direction = Literal["tr", "ir", "both"]
"""Which queries are to lose: images, captions, or all."""

Loss = Literal["cross", "margin", "cosine"]
"""`cross`: cross-entropy, in which all wrong answers count; `margin`: only the best of them; `cosine`: none."""

SHARPNESS = 3.0
"""Of the cross-entropy: similarities are divided by a third of their standard deviation over the gallery."""

BELOW = -10.0
"""Instead of similarities that do not count: below every cosine, and finite, so that gradients are."""

CELLS = {"cuda": 64_000_000, "cpu": 4_000_000}
"""Similarities held at once; bounds memory, changes no result."""


class Rivals:
    """What the queries of a batch compete with: the clean gallery without their right answers.

    Args:
        victim: the model and its gallery.
        batch: whose images and captions are the queries.
        loss: see `Loss`.
    """

    def __init__(self, victim: Victim, batch: Batch, loss: Loss) -> None:
        self._victim, self._batch, self._loss = victim, batch, loss
        self._own = torch.as_tensor(batch.caption_rows, device=batch.labels.device)
        self._home = batch.labels[batch.owner]

    @cached_property
    def _right_images(self) -> Tensor:
        """bool (captions, images): whom the captions describe."""
        victim, groups = self._victim, self._victim.caption_groups
        describes = torch.zeros(int(groups.max()) + 1, victim.images, dtype=torch.bool, device=groups.device)
        describes[groups, victim.caption_image] = True
        return describes[groups[self._own]]

    @cached_property
    def _right_captions(self) -> Tensor:
        """bool (images, gallery captions): what describes the images."""
        groups = self._victim.caption_groups
        described = torch.zeros(len(self._batch.labels), int(groups.max()) + 1, dtype=torch.bool, device=groups.device)
        described[self._batch.owner, groups[self._own]] = True
        return described[:, groups]

    @cached_property
    def _caption_sharpness(self) -> Tensor:
        """(captions,), of the clean captions' similarities to the gallery's images."""
        scores = inner_products(self._victim.text_features[self._own], self._victim.image_features)
        return SHARPNESS / scores.std(1).clamp_min(1e-6)

    @cached_property
    def _image_sharpness(self) -> Tensor:
        """(images,), of the clean images' similarities to the gallery's captions."""
        scores = inner_products(self._batch.clean_features(self._victim), self._victim.text_features)
        return SHARPNESS / scores.std(1).clamp_min(1e-6)

    def _ahead(self, scores: Tensor, sharpness: Tensor) -> Tensor:
        """The highest of each row, or under `cross` a smooth form of it, (rows,)."""
        if self._loss == "margin":
            return scores.amax(1)
        return (scores * sharpness[:, None]).logsumexp(1) / sharpness

    def of_captions(self, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What stands against the own image of changed captions: wrong images, and others that they describe.

        Args:
            features: (tries, dim), L2-normalised.
            rows: int64 (tries,), whose version each try is.

        Returns:
            Similarities (tries,) that a wrong image has, and that another right one has; `BELOW` where there is none.
        """
        victim = self._victim
        if self._loss == "cosine":
            nothing = features.new_zeros(len(features))
            return nothing, nothing + BELOW
        wrong, other = [], []
        size = max(1, CELLS["cuda" if features.is_cuda else "cpu"] // victim.images)
        for some, row in zip(features.split(size), rows.split(size), strict=True):
            scores, right = inner_products(some, victim.image_features), self._right_images[row]
            wrong.append(self._ahead(scores.masked_fill(right, BELOW), self._caption_sharpness[row]))
            others = right.scatter(1, self._home[row, None], False)
            other.append(scores.masked_fill(~others, BELOW).amax(1))
        return torch.cat(wrong), torch.cat(other)

    def of_images(self, captions: Tensor, direction: Direction, target: int | None = None) -> Objective:
        """`of_features` as an attack on pixels raises it."""
        loss = self.of_features(captions, direction, target)
        return lambda pixels, _: loss(self._victim.encode_image(pixels))

    def of_features(
        self, captions: Tensor, direction: Direction, target: int | None = None
    ) -> Callable[[Tensor], Tensor]:
        """The loss (images,) of the batch's image features, (images, dim), as queries and as answers to their captions.

        In the direction `tr` an image is the query, and loses if all its captions are behind a wrong one. In `ir` its
        captions are, and each loses if the image is behind a wrong one; the mean over them counts. `both` is the sum.

        Args:
            captions: (captions, dim) L2-normalised, of the batch's captions as they are now.
            direction: which queries are to lose.
            target: of all wrong captions only the one that has this place, from 0, by similarity to the clean image.
        """
        victim, owner, images = self._victim, self._batch.owner, len(self._batch.labels)
        shares = 1 / owner.bincount(minlength=images).to(captions.dtype)
        wrong_images = self.of_captions(captions, torch.arange(len(captions), device=owner.device))[0]
        texts, right = victim.text_features, self._right_captions
        aimed = None
        if target is not None:
            clean = inner_products(self._batch.clean_features(victim), texts).masked_fill(right, BELOW)
            aimed = clean.topk(target + 1).indices[:, target]

        def loss_of(features: Tensor) -> Tensor:
            own = (features[owner] * captions).sum(1)
            loss = features.new_zeros(images)
            if direction != "ir":
                if self._loss == "cosine":
                    wrong, held = loss, loss.index_add(0, owner, own * shares[owner])
                else:
                    scores = inner_products(features, texts).masked_fill(right, BELOW)
                    if aimed is not None:
                        wrong = scores.gather(1, aimed[:, None])[:, 0]
                    else:
                        wrong = self._ahead(scores, self._image_sharpness)
                    held = self._ahead(by_image(own, owner, images), self._image_sharpness)
                loss = loss + self._lost(wrong - held, self._image_sharpness)
            if direction != "tr":
                lost = self._lost(wrong_images - own, self._caption_sharpness)
                loss = loss.index_add(0, owner, lost * shares[owner])
            return loss

        return loss_of

    def _lost(self, ahead: Tensor, sharpness: Tensor) -> Tensor:
        """The loss of queries whose wrong answers are so far ahead."""
        return F.softplus(sharpness * ahead) if self._loss == "cross" else ahead

    def misfit(self, image_features: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of captions as queries, a `text.Misfit`; monotone in their cross-entropy under `cross`.

        Args:
            image_features: (images, dim) L2-normalised, of the batch's images as they are now.
        """

        def loss(features: Tensor, rows: Tensor) -> Tensor:
            wrong, other = self.of_captions(features, rows)
            own = (features * image_features[self._batch.owner[rows]]).sum(1)
            return wrong - torch.maximum(own, other)

        return loss


def by_image(values: Tensor, owner: Tensor, images: int) -> Tensor:
    """The values of captions, (captions,), in a row for each image, filled up with `BELOW`; `owner` rises."""
    counts = owner.bincount(minlength=images)
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    rows = values.new_full((images, int(counts.max())), BELOW)
    return rows.index_put((owner, place), values)
