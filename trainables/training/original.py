"""The frozen original's embeddings of clean images, which the anchor and the attack by deviation look at."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trainables.config import content_hash
from trainables.data.cache import locked
from trainables.models import RetrievalModel
from trainables.precision import autocast
from trainables.prepare import Prepared

AT_ONCE = 128
"""Images embedded in one call."""

VERSION = 1
"""Of how images are embedded: raise it when the same model would embed them otherwise."""


class Original:
    """The model before training, of which only what images need is kept.

    Training images are embedded beforehand, once for all trials. Where they are cropped at random, the image side
    itself is kept, and embeds what the trained model sees.

    Args:
        prepared: the model is on the device and not trained yet.
        device: of the model.
        cropped: whether images are cropped.
    """

    def __init__(self, prepared: Prepared, device: torch.device, *, cropped: bool) -> None:
        self._frozen = frozen_image_side(prepared.base) if cropped else None
        self._table = None if cropped else torch.from_numpy(_embeddings(prepared, device)).to(device)

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


def _embeddings(prepared: Prepared, device: torch.device) -> np.ndarray:
    """Of all training images, float32 (images, dim).

    Made once for a base model and its training images, and shared by all trials of a node: the first embeds, the others
    wait and read its file. Bfloat16 and float32 are kept apart, so that a trial is resumed with what it began with.
    """
    pixels = prepared.dataset.train.pixels
    if prepared.cache_dir is None:
        return _embedded(prepared.base, pixels, device)
    kind = str(torch.get_autocast_dtype(device.type) if device.type == "cuda" else torch.float32)
    identity = {"version": VERSION, "computed": kind, **{name: prepared.hashes[name] for name in ("base", "data")}}
    path = prepared.cache_dir / f"original-{content_hash(identity)}.npy"
    with locked(path):
        found = _kept(path, len(pixels))
        if found is None:
            found = _embedded(prepared.base, pixels, device)
            part = path.with_name(f"{path.name}.tmp")
            try:
                with part.open("wb") as file:
                    np.save(file, found)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
    return found


def _kept(path: Path, images: int) -> np.ndarray | None:
    """What the file holds, or None if there is none or it is torn."""
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 2 and len(found) == images else None


@torch.no_grad()
def _embedded(model: RetrievalModel, pixels: np.ndarray, device: torch.device) -> np.ndarray:
    model.eval()
    parts = np.array_split(np.arange(len(pixels)), 1 + len(pixels) // AT_ONCE)
    with autocast(device):
        found = [model.encode_image(torch.tensor(pixels[rows], device=device) / 255).float() for rows in parts]
    return torch.cat(found).cpu().numpy()
