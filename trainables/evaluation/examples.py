"""What an attack did to single pairs, to look at."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainables.attacks.contract import Attacked
from trainables.config import CLEAN
from trainables.evaluation.robustness import Evaluation, Gallery

TOP = 5
GAIN = 0.5
"""Brightness of the largest difference, so that a perturbation of any radius can be seen; grey is no change."""


@dataclass(frozen=True)
class Answer:
    """One retrieved item: a caption, or an image as PNG."""

    right: bool
    caption: str = ""
    image: bytes = b""


@dataclass(frozen=True)
class Example:
    """An image with its first caption, before and after an attack.

    Attributes:
        place: in the gallery.
        images: PNG of the clean image, the attacked one and their difference, amplified.
        amplified: factor of the difference.
        captions: before and after.
        captions_found: the first captions found with the clean and with the attacked image.
        images_found: the first images found with the clean and with the attacked caption.
    """

    place: int
    images: tuple[bytes, bytes, bytes]
    amplified: float
    captions: tuple[str, str]
    captions_found: tuple[list[Answer], list[Answer]]
    images_found: tuple[list[Answer], list[Answer]]


def examples(
    found: Evaluation, target: str, gallery: Gallery, attacked: Callable[[np.ndarray], Attacked], count: int
) -> list[Example]:
    """Images that lost their first rank to the attack, then others, in the gallery's order.

    Args:
        found: the evaluation, with `target` and clean.
        target: an attack.
        gallery: what was attacked.
        attacked: reads what the attack made of images, by their places.
        count: how many at most.
    """
    before, after = found.ranks[CLEAN].tr, found.ranks[target].tr
    lost = np.flatnonzero((before == 1) & (after > 1))
    places = np.concatenate([lost, np.setdiff1d(np.arange(len(before)), lost)])[:count]
    return [_example(found, target, gallery, attacked(np.array([place])), int(place)) for place in places]


def _example(found: Evaluation, target: str, gallery: Gallery, attacked: Attacked, place: int) -> Example:
    clean = gallery.pixels[place].astype(np.float32) / 255
    changed = attacked.pixels[0].numpy()
    gain = GAIN / max(float(np.abs(changed - clean).max()), 1e-6)
    caption = int(np.flatnonzero(gallery.caption_image == place)[0])
    texts = gallery.texts
    (image, text), (image_after, text_after) = (found.features[name] for name in (CLEAN, target))
    return Example(
        place=place,
        images=(_png(clean), _png(changed), _png(0.5 + gain * (changed - clean))),
        amplified=gain,
        captions=(texts[caption], attacked.captions[0]),
        captions_found=(
            _captions_found(gallery, texts, image[place], text, place),
            _captions_found(gallery, texts, image_after[place], text_after, place),
        ),
        images_found=(
            _images_found(gallery, text[caption], image, caption),
            _images_found(gallery, text_after[caption], image_after, caption),
        ),
    )


def _captions_found(gallery: Gallery, texts: list[str], image: Tensor, captions: Tensor, place: int) -> list[Answer]:
    rows = _best(captions @ image)
    return [Answer(right=bool(gallery.caption_image[row] == place), caption=texts[row]) for row in rows]


def _images_found(gallery: Gallery, caption: Tensor, images: Tensor, row: int) -> list[Answer]:
    own = gallery.caption_image[row]
    return [
        Answer(right=place == own, image=_png(gallery.pixels[place].astype(np.float32) / 255))
        for place in _best(images @ caption)
    ]


def _best(scores: Tensor) -> list[int]:
    return torch.nan_to_num(scores.float(), nan=-torch.inf).topk(min(TOP, len(scores))).indices.tolist()


def _png(pixels: np.ndarray) -> bytes:
    """(3, height, width) in [0, 1]."""
    levels = (pixels.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "png")
    return file.getvalue()
