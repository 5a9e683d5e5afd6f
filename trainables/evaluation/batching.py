"""How many images are attacked at once: as many as the memory of a GPU holds, where that changes no result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from trainables.attacks.contract import Attack
from trainables.config import BATCH_IMAGES, Protocol
from trainables.errors import InputError
from trainables.models import RetrievalModel

COPIES = 5
"""Of an image that an attack passes through the model at once, at most: SGA's scales."""

SHARE = 0.5
"""Of the free memory that a batch may take: other trials may share the device."""

MOST = 512
"""Images at once; more keep no device any busier."""

Result = TypeVar("Result")


def images_at_once(
    model: RetrievalModel, image: Tensor, protocol: Protocol, attacks: Iterable[Attack], device: torch.device
) -> int:
    """The protocol's number, if it has one; `BATCH_IMAGES` on the CPU, and where a result depends on it.

    Args:
        model: on the device, parameters without gradient.
        image: float (1, 3, height, width), one of those to come, on the device.
        protocol: of the evaluation.
        attacks: those of the protocol.
        device: of the model.
    """
    if protocol.batch_images is not None:
        return protocol.batch_images
    if device.type != "cuda" or not all(attack.alone for attack in attacks):
        return BATCH_IMAGES
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(np.clip(SHARE * free / (COPIES * kept_bytes(model, image)), 1, MOST))


def kept_bytes(model: RetrievalModel, pixels: Tensor) -> int:
    """What a forward pass of images keeps for the gradient to their pixels; weights are not counted.

    Args:
        model: parameters without gradient.
        pixels: float (images, 3, height, width).
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.encode_image(pixels.detach().requires_grad_(True))
    return sum(kept.values())


def batches(
    images: np.ndarray,
    size: int,
    run: Callable[[np.ndarray], Result],
    *,
    halve: bool = True,
    done: np.ndarray | None = None,
) -> Iterator[Result]:
    """What `run` makes of every batch of images, in order; where memory is not enough, of halves from there on.

    Args:
        images: (images,) places in the gallery, or in whatever else is gone through.
        size: of a batch, at most.
        run: may be called again for images for which it ran out of memory.
        halve: whether the size may change.
        done: of the images, those that are left out; the others are divided as if they were not.

    Raises:
        OutOfMemoryError: of the device, with a single image.
        InputError: of memory, where the size may not change.
    """
    left = np.array_split(images, max(1, -(-len(images) // size)))
    if done is not None:
        left = [some for part in left if len(some := part[~np.isin(part, done)])]
    while left:
        try:
            result = run(left[0])
        except torch.OutOfMemoryError as error:
            if len(left[0]) < 2:
                raise
            if not halve:
                raise InputError(
                    f"protocol.batch_images: the evaluation has no memory for {len(left[0])} images at once, and what "
                    "some of its attacks find depends on that number; give a smaller one"
                ) from error
        else:
            left.pop(0)
            yield result
            continue
        torch.cuda.empty_cache()  # out of the handler, which holds what the attempt held
        left = [half for part in left for half in np.array_split(part, 2) if len(half)]
