"""Which pairs a step trains on, and how they are augmented: functions of seed, epoch and sample, without state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.noise import sample_keys, step_keys, uniform
from trainables.config import TrialConfig
from trainables.data import Split

CROP_AREA = 0.5
"""Smallest share of an image that a random crop keeps, as in ALBEF's and BLIP's fine-tuning."""
CROP_DRAW, CAPTION_DRAW = 7, 13
"""Tell these apart from the other draws of an image, see `step_keys`."""


@dataclass(frozen=True)
class Drawn:
    """A global batch.

    Attributes:
        epoch: it belongs to.
        images: (size,) rows of the training images.
        captions: (size, captions per image) rows of the training captions.
    """

    epoch: int
    images: np.ndarray
    captions: np.ndarray

    def share(self, rank: int, world: int) -> Drawn:
        """A worker's part; what does not divide is left out."""
        size = len(self.images) // world
        part = slice(rank * size, (rank + 1) * size)
        return Drawn(self.epoch, self.images[part], self.captions[part])


def epoch_shape(config: TrialConfig, images: int) -> tuple[int, int]:
    """Global batch size and steps of an epoch over so many training images."""
    drawn = min(images, config.training.epoch_images or images)
    size = min(config.training.batch_size, drawn)
    return size, drawn // size


def draw_batch(config: TrialConfig, train: Split, step: int) -> Drawn:
    """The global batch at `step`: a function of seed and step alone.

    An image comes with captions drawn without repetition; with fewer than are asked for, they come again.
    """
    images, wanted = len(train.image_ids), config.point.captions_per_image
    size, per_epoch = epoch_shape(config, images)
    epoch, place = divmod(step, per_epoch)
    rows = _order(config.seed, epoch, images)[place * size : (place + 1) * size]
    starts = np.searchsorted(train.caption_image, rows)
    counts = (np.searchsorted(train.caption_image, rows, side="right") - starts)[:, None]
    places = np.arange(counts.max())
    keys = step_keys(sample_keys(config.seed, epoch, torch.from_numpy(rows)), CAPTION_DRAW)
    draws = uniform(keys, places.shape).numpy()
    order = np.where(places < counts, draws, np.inf).argsort(1, kind="stable")  # captions that are not there come last
    picked = np.take_along_axis(order, np.arange(wanted) % counts, 1)
    return Drawn(epoch, rows, starts[:, None] + picked)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The training images in the order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(images)


def rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then cosine to zero; the learning rate's factor at `step`."""
    warmup = max(1, round(warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def ramped_epsilon(config: TrialConfig, step: int, steps: int) -> float:
    """Radius of the training attack at `step`: `epsilon_start`, then a linear ramp, then `epsilon`.

    Robust fine-tuning from a model that is not robust goes better if the radius starts small (arXiv 2509.23325).
    """
    point = config.point
    if point.ramp_end == 0 or point.epsilon == 0:
        return point.epsilon
    done = step / steps
    if point.ramp_end == point.ramp_begin:
        share = float(done >= point.ramp_end)
    else:
        share = min(1.0, max(0.0, (done - point.ramp_begin) / (point.ramp_end - point.ramp_begin)))
    return point.epsilon_start + share * (point.epsilon - point.epsilon_start)


def ramped_distillation(config: TrialConfig, step: int, steps: int) -> float:
    """The teacher's share of the targets at `step`: it rises from 0 within the first epoch (Li et al. 2021, 3.5)."""
    return config.point.distillation * min(1.0, step * config.training.epochs / steps)


def random_crops(pixels: Tensor, keys: Tensor) -> Tensor:
    """Crops of at least `CROP_AREA` of each image, resized to the whole, half of them mirrored.

    Args:
        pixels: (batch, 3, size, size) in [0, 1].
        keys: int64 (batch,), the source of each image's randomness.
    """
    area, left, top, mirrored = uniform(step_keys(keys, CROP_DRAW), (4,)).to(pixels.device).unbind(1)
    side = (CROP_AREA + (1 - CROP_AREA) * area).sqrt()
    across = torch.where(mirrored < 0.5, -side, side)
    room = 1 - side
    places = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    places[:, 0, 0], places[:, 0, 2] = across, room * (2 * left - 1)
    places[:, 1, 1], places[:, 1, 2] = side, room * (2 * top - 1)
    grid = F.affine_grid(places, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False).clamp(0, 1)
