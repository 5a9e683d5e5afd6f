"""Data and models made on the spot, as large as the real ones where that is what costs."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import MobileNetV2Config, MobileNetV2ImageProcessor, MobileNetV2Model

CAPTIONS, PICTURES, PIXELS = 5, 16, 16
"""Captions an image; different images, to which the others are links; and their size."""


def coco_set(root: Path, records: int) -> None:
    """A COCO captions document of random sentences over 3,000 words, as frequent as Zipf says, one record in 24 for
    the search to measure and one for the end."""
    rng, numbers = random.Random(0), np.random.default_rng(0)
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = sorted({"".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(3500)})[:3000]
    rng.shuffle(words)
    shares = [1 / rank for rank in range(1, len(words) + 1)]
    drawn = iter(rng.choices(words, shares, k=6 * CAPTIONS * records))
    (root / "images").mkdir(parents=True)
    for number in range(PICTURES):
        pixels = numbers.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.jpg")
    images, annotations = [], []
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for number in range(1, records + 1):
        splits[{0: "test", 1: "val"}.get(number % 24, "train")].append(number)
        name = f"{number:012}.jpg"
        os.link(root / f"{number % PICTURES}.jpg", root / "images" / name)
        images.append({"id": number, "file_name": name, "height": PIXELS, "width": PIXELS})
        for caption in range(CAPTIONS):
            text = "A {} {} with the {} {} on a {} {}.".format(*(next(drawn) for _ in range(6)))
            annotations.append({"id": CAPTIONS * number + caption, "image_id": number, "caption": text})
    (root / "split.json").write_text(json.dumps(splits), encoding="utf-8")
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")


def image_tower(folder: Path) -> None:
    """A small MobileNet with random weights."""
    torch.manual_seed(0)
    MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25)).save_pretrained(folder)
    MobileNetV2ImageProcessor().save_pretrained(folder)
