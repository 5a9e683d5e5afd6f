"""The frozen original's embeddings of clean images, which the anchor and the attack by deviation look at."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from trainables.models import RetrievalModel
from trainables.precision import autocast
from trainables.prepare import Prepared

AT_ONCE = 128
"""Images embedded in one call."""


class Original:
    """The model before training, of which only what images need is kept.

    Training images are embedded once, beforehand. Where they are cropped at random, the image side itself is kept, and
    embeds what the trained model sees.

    Args:
        prepared: the model is on the device and not trained yet.
        device: of the model.
        cropped: whether images are cropped.
    """

    def __init__(self, prepared: Prepared, device: torch.device, *, cropped: bool) -> None:
        self._frozen = frozen_image_side(prepared.base) if cropped else None
        self._table = None if cropped else _embeddings(prepared.base, prepared.dataset.train.pixels, device)

    @torch.no_grad()
    def __call__(self, rows: Tensor, pixels: Tensor) -> Tensor:
        """Embeddings, (batch, dim) float32.

        Args:
            rows: int64 (batch,), of the training images, on the device.
            pixels: (batch, 3, height, width) in [0, 1], the clean images as the trained model sees them.
        """
        if self._table is not None:
            return self._table[rows]
        assert self._frozen is not None
        with autocast(pixels.device):
            return self._frozen.encode_image(pixels).float()


def frozen_image_side(model: RetrievalModel) -> RetrievalModel:
    """A copy in eval mode, without gradients; of parameters that embed no image it has none."""
    used = {id(parameter) for parameter in model.image_parameters()}
    empty = {id(unused): nn.Parameter(torch.empty(0)) for unused in model.parameters() if id(unused) not in used}
    return copy.deepcopy(model, empty).requires_grad_(False).eval()


@torch.no_grad()
def _embeddings(model: RetrievalModel, pixels: np.ndarray, device: torch.device) -> Tensor:
    model.eval()
    parts = np.array_split(np.arange(len(pixels)), 1 + len(pixels) // AT_ONCE)
    with autocast(device):
        return torch.cat(
            [model.encode_image(torch.tensor(pixels[rows], device=device) / 255).float() for rows in parts]
        )
