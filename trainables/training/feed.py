"""What a step trains on, on the device before the step needs it.

Draws are functions of seed, epoch and sample. On a GPU a thread draws the next batches, reads the memory map into
pinned memory and copies it on a stream of its own while this batch trains. Pixels travel as 8 bits, and what follows
from row numbers is computed on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainables.attacks.lexicon import lexicon_of
from trainables.attacks.noise import sample_keys
from trainables.config import TrialConfig
from trainables.prepare import Prepared
from trainables.training.batches import Drawn, draw_batch
from trainables.training.losses import Sides
from trainables.training.positives import Positives
from trainables.training.texts import Texts, draw_texts

AHEAD = 2
"""Batches that are under way while one trains."""

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Batch:
    """A worker's share of a global batch, n captions an image.

    Attributes:
        images: int64 (batch,), rows of this worker's images.
        pixels: (batch, 3, height, width) in [0, 1], clean and whole.
        positives: bool, which captions of all workers describe this worker's images, and the other way around.
        keys: int64 (batch,), the source of each image's randomness.
        texts: the captions.
        caption_keys: int64 (batch x n,), of each caption's.
    """

    images: Tensor
    pixels: Tensor
    positives: Sides
    keys: Tensor
    texts: Texts
    caption_keys: Tensor


@dataclass(frozen=True, eq=False)
class _Sent:
    """What travels: row numbers of all workers, images first, and this worker's 8-bit pixels and captions."""

    own: Drawn
    rows: Tensor
    pixels: Tensor
    texts: Texts
    copied: Any = None


def _copied(tensor: Tensor, device: torch.device, pinned: bool) -> Tensor:
    """On the device, or on the way there."""
    return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)


def _held(tensor: Tensor, stream: Any) -> Tensor:
    """Not given away before `stream` is done with it, though it was allocated on another."""
    tensor.record_stream(stream)
    return tensor


def ahead(make: Callable[[int], Made], steps: range) -> Iterator[Made]:
    """What `make` gives for each step, in order, by a thread that is up to `AHEAD` steps in front of who asks."""
    coming: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1, "feed") as thread:
        for step in steps:
            coming.append(thread.submit(make, step))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        for made in coming:
            yield made.result()


class Feed:
    """Batches of a trial, with the tables that they look things up in, which stay on the device.

    Args:
        config: of the trial.
        prepared: its pairs.
        device: of this worker.
    """

    def __init__(self, config: TrialConfig, prepared: Prepared, device: torch.device) -> None:
        self._config, self._train, self._device = config, prepared.dataset.train, device
        self._substitutes, self._lexicon = prepared.train, lexicon_of(prepared.base.tokenizer)
        self._image_ids = torch.from_numpy(self._train.image_ids).to(device)
        self._positives = Positives(self._train.caption_image, prepared.caption_groups, device)
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def batches(self, first: int, end: int) -> Iterator[Batch]:
        """Those of the steps from `first` to before `end`."""
        if self._device.type != "cuda":
            yield from map(self._batch, map(self._send, range(first, end)))
            return
        stream = torch.cuda.Stream(self._device)
        for sent in ahead(lambda step: self._send(step, stream), range(first, end)):
            current = torch.cuda.current_stream(self._device)
            current.wait_event(sent.copied)
            hold = partial(_held, stream=current)
            hold(sent.rows), hold(sent.pixels), sent.texts.moved(hold)
            yield self._batch(sent)

    def _send(self, step: int, stream: Any = None) -> _Sent:
        """Draw a batch, read its pixels and begin to copy it to the device, on `stream` if there is one."""
        drawn = draw_batch(self._config, self._train, step)
        parts = [drawn.share(rank, self._world) for rank in range(self._world)]
        rows = np.concatenate([part.images for part in parts] + [part.captions.flatten() for part in parts])
        own, shape = parts[self._rank], self._train.pixels.shape[1:]
        texts = draw_texts(self._config, self._substitutes, self._lexicon, parts, self._rank)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            pixels = torch.empty((len(own.images), *shape), dtype=torch.uint8, pin_memory=stream is not None)
            # Other modes copy once more.
            np.take(self._train.pixels, own.images, axis=0, out=pixels.numpy(), mode="clip")
            send = partial(_copied, device=self._device, pinned=stream is not None)
            copies = send(torch.from_numpy(rows)), send(pixels), texts.moved(send)
            return _Sent(own, *copies, None if stream is None else stream.record_event())

    def _batch(self, sent: _Sent) -> Batch:
        """The rest, on the device."""
        own = sent.own
        everyones = self._world * len(own.images)
        images, captions = sent.rows[:everyones], sent.rows[everyones:]
        own_images, own_captions = (rows.chunk(self._world)[self._rank] for rows in (images, captions))
        seed = self._config.seed
        return Batch(
            images=own_images,
            pixels=sent.pixels / 255,
            positives=(self._positives(own_images, captions), self._positives(images, own_captions).T),
            keys=sample_keys(seed, own.epoch, self._image_ids[own_images]),
            texts=sent.texts,
            caption_keys=sample_keys(seed, own.epoch, own_captions),
        )
