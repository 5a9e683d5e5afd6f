"""What an evaluation has done of itself: features of some images and captions, and pairs for a second look."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainables.attacks.contract import Attack, Attacked
from trainables.attacks.lexicon import Captions


class Kept(Protocol):
    """Where an evaluation keeps what it has done of it, so that another attempt does the rest only.

    A piece is of some images: tensors by name, on the CPU, and their places in the gallery as `images`.
    """

    def load(self) -> Iterable[dict[str, Tensor]]:
        """All pieces, of all workers."""

    def due(self) -> bool:
        """Whether what was done since the last piece is to be kept now."""

    def save(self, piece: dict[str, Tensor]) -> None:
        """Keep a piece."""


@dataclass(frozen=True, eq=False)
class Part:
    """What is scored of some images.

    Attributes:
        images: int64, places in the gallery.
        captions: int64, of theirs.
        scored: features of images and captions by target.
    """

    images: np.ndarray
    captions: np.ndarray
    scored: dict[str, tuple[Tensor, Tensor]]

    def piece(self, made: Mapping[str, Made]) -> dict[str, Tensor]:
        """See `Kept`."""
        tensors = {"images": torch.from_numpy(self.images), "captions": torch.from_numpy(self.captions)}
        for target, (image, text) in self.scored.items():
            tensors |= {f"image {target}": image.cpu(), f"text {target}": text.cpu()}
        for name, pairs in made.items():
            tensors |= {f"{kind} {name}": part for kind, part in pairs.taken(self.images, self.captions).items()}
        return tensors


def joined(parts: Sequence[Part]) -> Part:
    """One of all of them."""
    scored = {
        target: (
            torch.cat([part.scored[target][0] for part in parts]),
            torch.cat([part.scored[target][1] for part in parts]),
        )
        for target in parts[0].scored
    }
    return Part(
        np.concatenate([part.images for part in parts]), np.concatenate([part.captions for part in parts]), scored
    )


def found_again(kept: Kept, own_images: np.ndarray, device: torch.device, made: Mapping[str, Made]) -> list[Part]:
    """Of what is kept, each of this worker's images once; what was made of them is put back into `made`."""
    parts: list[Part] = []
    left = set(own_images.tolist())
    for piece in kept.load():
        images, captions = piece["images"].numpy(), piece["captions"].numpy()
        if not left.issuperset(images.tolist()):  # partly another worker's, now that there are more or fewer
            continue
        left -= set(images.tolist())
        targets = [name.removeprefix("image ") for name in piece if name.startswith("image ")]
        pairs = {
            target: (piece[f"image {target}"].to(device), piece[f"text {target}"].to(device)) for target in targets
        }
        parts.append(Part(images, captions, pairs))
        for name, one in made.items():
            one.put(images, captions, {kind: piece[f"{kind} {name}"] for kind in KINDS if f"{kind} {name}" in piece})
    return parts


KINDS = ("pixels", "words", "spelled")
"""What a piece has of attacked pairs."""


@dataclass
class Made:
    """Attacked pairs, kept for a second look.

    Attributes:
        pixels: uint8 where they are the gallery's or on the levels of 8 bits, else float32; in a file if they changed.
        captions: on the host, in the gallery's order.
        changed: whether an attack changes the pixels.
        spelled: captions that an attack gave as strings, by their rows.
    """

    pixels: np.ndarray
    captions: Captions
    changed: bool = False
    spelled: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(
        cls, folder: Path, name: str, pixels: np.ndarray, captions: Captions, attack: Attack, rounded: bool
    ) -> Made:
        """Of clean captions and pixels, which an attack is still to change."""
        own = Captions(captions.rows.clone(), captions.lexicon)
        if "image" not in attack.changes:
            return cls(pixels, own)
        dtype = np.uint8 if rounded else np.float32
        return cls(np.memmap(folder / name, dtype=dtype, mode="w+", shape=pixels.shape), own, changed=True)

    def add(self, labels: np.ndarray, rows: np.ndarray, attacked: Attacked) -> None:
        """What an attack made of some images, and of `rows`, their captions."""
        if self.changed:
            pixels = attacked.pixels.float()
            levels = (255 * pixels).round().byte() if self.pixels.dtype == np.uint8 else pixels
            self.pixels[labels] = levels.cpu().numpy()
        if isinstance(attacked.captions, Captions):
            words = attacked.captions.rows.cpu()
            self.captions.rows[rows, : words.shape[1]] = words
        else:
            self.spelled.update(zip(rows.tolist(), attacked.captions, strict=True))

    def taken(self, images: np.ndarray, rows: np.ndarray) -> dict[str, Tensor]:
        """What was added of some images and their captions: tensors by `KINDS`."""
        spelled = json.dumps({int(row): self.spelled[row] for row in rows.tolist() if row in self.spelled}).encode()
        found = {
            "words": self.captions.rows[rows],
            "spelled": torch.from_numpy(np.frombuffer(spelled, np.uint8).copy()),
        }
        return found | ({"pixels": torch.from_numpy(self.pixels[images])} if self.changed else {})

    def put(self, images: np.ndarray, rows: np.ndarray, found: Mapping[str, Tensor]) -> None:
        """What `taken` gave."""
        if self.changed:
            self.pixels[images] = found["pixels"].numpy()
        self.captions.rows[rows] = found["words"]
        spelled = json.loads(found["spelled"].numpy().tobytes())
        self.spelled.update({int(row): text for row, text in spelled.items()})

    def everyones(self, own: np.ndarray) -> Sequence[str]:
        """All captions; each worker attacked its own."""
        words, spelled = self.captions.rows, self.spelled
        if dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (own, words[own].numpy(), spelled))
            for rows, found, written in parts:
                words[rows] = torch.from_numpy(found)
                spelled |= written
        captions = Captions(words, self.captions.lexicon)
        return [spelled.get(row, text) for row, text in enumerate(captions)] if spelled else captions
