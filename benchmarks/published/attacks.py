"""SGA, CMI-Attack, DRA, Co-Attack and Sep-Attack as published, put together from their texts' and images' parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.published import images as pixels
from benchmarks.published.words import Misfit, Reading, attack_caption, divergence


@dataclass(frozen=True)
class Victim:
    """A model under attack.

    Attributes:
        image_features: Images in [0, 1] to embeddings of length 1; normalises inside.
        text_features: Texts and the most tokens to read of each, to embeddings of length 1.
        max_length: Tokens that it reads of a text.
    """

    image_features: Callable[[torch.Tensor], torch.Tensor]
    text_features: Callable[[Sequence[str], int], torch.Tensor]
    max_length: int = 77

    def texts(self, texts: Sequence[str], max_length: int | None = None) -> torch.Tensor:
        """Embeddings without gradient."""
        with torch.no_grad():
            return self.text_features(texts, self.max_length if max_length is None else max_length)

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings without gradient."""
        with torch.no_grad():
            return self.image_features(images)


@dataclass(frozen=True)
class Pairs:
    """Images, captions, and of each caption the index of its image."""

    images: torch.Tensor
    captions: Sequence[str]
    owners: Sequence[int]

    @property
    def rows(self) -> torch.Tensor:
        """`owners` beside the images."""
        return torch.tensor(list(self.owners), device=self.images.device)


Attacked = tuple[torch.Tensor, list[str]]

SUPERVISION_TOKENS = 30
"""Tokens of a caption that the image attack reads, CLIP's too: the scripts' `max_lemgth=` reaches nothing."""


def away_from(guides: Sequence[tuple[float, torch.Tensor]]) -> Misfit:
    """Minus the weighted cosines to image embeddings, each `(dim,)`."""
    guide = torch.stack([weight * features for weight, features in guides]).sum(0)
    return lambda features: -(features @ guide)


def guided_captions(
    victim: Victim,
    reading: Reading,
    pairs: Pairs,
    guides: Sequence[tuple[float, torch.Tensor]],
    words_changed: int = 1,
) -> list[str]:
    """Every caption away from weighted image embeddings, each `(images, dim)`."""
    return [
        attack_caption(
            victim.texts,
            away_from([(weight, features[owner]) for weight, features in guides]),
            reading,
            caption,
            words_changed,
        )
        for caption, owner in zip(pairs.captions, pairs.owners, strict=True)
    ]


def unguided_captions(victim: Victim, reading: Reading, captions: Sequence[str], words_changed: int = 1) -> list[str]:
    """Every caption away from itself: the divergence from its own clean embedding."""

    def attacked(text: str) -> str:
        own = victim.texts([text])
        return attack_caption(victim.texts, lambda features: divergence(own, features), reading, text, words_changed)

    return list(map(attacked, captions))


def sga(
    victim: Victim,
    reading: Reading,
    pairs: Pairs,
    draws: pixels.Draws,
    epsilon: float = 2 / 255,
    step_size: float = 0.5 / 255,
    steps: int = 10,
    words_changed: int = 1,
    supervision_tokens: int = SUPERVISION_TOKENS,
) -> Attacked:
    """Captions against the clean images, images against those captions, the original captions against those images."""
    first = guided_captions(victim, reading, pairs, [(1.0, victim.images(pairs.images))], words_changed)
    texts = victim.texts(first, supervision_tokens)
    images = pixels.sga_images(victim.image_features, pairs.images, texts, pairs.rows, draws, epsilon, step_size, steps)
    return images, guided_captions(victim, reading, pairs, [(1.0, victim.images(images))], words_changed)


def cmi(
    victim: Victim,
    reading: Reading,
    pairs: Pairs,
    draws: pixels.Draws,
    epsilon: float = 2 / 255,
    step_size: float = 0.5 / 255,
    steps: int = 10,
    momentum: float = 0.9,
    words_changed: int = 1,
) -> Attacked:
    """Captions against randomly started images, then images against those captions.

    The images' steps begin anew with the momentum of one gradient at the first start (draws of step 0). What a table of
    word vectors proposes for the words that it knows is left out: all words are read as those that it does not know.
    """
    started = pixels.random_start(pairs.images, epsilon, draws.start(0))
    captions = guided_captions(victim, reading, pairs, [(1.0, victim.images(started))], words_changed)
    texts = victim.texts(captions)
    inertia = pixels.set_gradient(victim.image_features, started, texts, pairs.rows, draws, 0)
    images = pixels.sga_images(
        victim.image_features,
        pairs.images,
        texts,
        pairs.rows,
        draws,
        epsilon,
        step_size,
        steps,
        momentum,
        inertia,
        start=1,
    )
    return images, captions


def dra(
    victim: Victim,
    reading: Reading,
    pairs: Pairs,
    draws: pixels.Draws,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    words_changed: int = 1,
    supervision_tokens: int = SUPERVISION_TOKENS,
    free: bool = True,
) -> Attacked:
    """As SGA, with DRA's steps, and the last captions against clean, last and next to last images: 0.6, 0.2, 0.2."""
    clean = victim.images(pairs.images)
    first = guided_captions(victim, reading, pairs, [(1.0, clean)], words_changed)
    texts = victim.texts(first, supervision_tokens)
    images, previous = pixels.dra_images(
        victim.image_features,
        pairs.images,
        texts,
        pairs.rows,
        draws,
        epsilon,
        step_size,
        steps,
        free=free,
    )
    guides = [(0.6, clean), (0.2, victim.images(images)), (0.2, victim.images(previous))]
    return images, guided_captions(victim, reading, pairs, guides, words_changed)


def co_attack(
    victim: Victim,
    reading: Reading,
    pairs: Pairs,
    draws: pixels.Draws,
    epsilon: float = 2 / 255,
    steps: int = 10,
    words_changed: int = 1,
    one_sided: bool = True,
    last_caption: bool = True,
) -> Attacked:
    """Captions away from themselves; then, for every pair, the image; of an image, its last caption's version is kept.

    Every version of an image begins at the same draw.

    Args:
        victim: Attacked.
        reading: Of the captions.
        pairs: Attacked.
        draws: Of the starts.
        epsilon: Radius.
        steps: Of the images.
        words_changed: Of a caption at most.
        one_sided: Starts lie above the image.
        last_caption: As published; otherwise each image is attacked once, against all its captions.
    """
    captions = unguided_captions(victim, reading, pairs.captions, words_changed)
    texts, attacked = victim.texts(captions), pairs.images.clone()
    for image in range(len(attacked)):
        alone = replace(draws, start=partial(_start_of, draws, image))
        rows = [row for row, owner in enumerate(pairs.owners) if owner == image]
        for against in [[row] for row in rows] if last_caption else [rows]:
            attacked[image] = pixels.co_attack_images(
                victim.image_features,
                pairs.images[image : image + 1],
                texts[against],
                alone,
                epsilon,
                steps,
                one_sided=one_sided,
            )[0]
    return attacked, captions


def _start_of(draws: pixels.Draws, image: int, i: int) -> torch.Tensor:
    return draws.start(i)[image : image + 1]


def sep_attack(
    victim: Victim,
    reading: Reading,
    pairs: Pairs,
    draws: pixels.Draws,
    epsilon: float = 2 / 255,
    step_size: float = 0.5 / 255,
    steps: int = 10,
    words_changed: int = 1,
) -> Attacked:
    """Both modalities apart: captions away from themselves, images away from themselves."""
    images = pixels.separate_images(victim.image_features, pairs.images, draws, epsilon, step_size, steps)
    return images, unguided_captions(victim, reading, pairs.captions, words_changed)
