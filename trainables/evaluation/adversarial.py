"""Adversarial examples on disk, by (model, attack, sample): for transfer to other models, re-ranking and pages."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainables.attacks import contract
from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.config import Protocol, content_hash
from trainables.evaluation.robustness import Gallery
from trainables.identity import file_digest, files_digest
from trainables.models import RetrievalModel
from trainables.results import library_versions

ATTACKS = Path(contract.__file__).parent
"""Code that all attacks share."""


def model_digest(model: RetrievalModel) -> str:
    """First 16 hex digits of the SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + str(tensor.dtype).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def victim_digest(model: RetrievalModel, max_tokens: int) -> str:
    """Hash of all that decides what a model computes: weights, configuration, tokenizer, and where captions are cut."""
    configs = [getattr(part, "config", None) for part in model.children()]
    tokenizer = model.tokenizer
    return content_hash(
        {
            "weights": model_digest(model),
            "modules": str(model),
            "configs": [
                {field: str(value) for field, value in config.to_dict().items() if field not in NO_CONTENT}
                for config in configs
                if config is not None
            ],
            "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab(),
            "max_tokens": max_tokens,
        }
    )


NO_CONTENT = ("_name_or_path", "transformers_version")
"""Fields of a configuration that say where it came from."""

LIBRARIES = ("torch", "torchattacks", "transformers")
"""Whose versions decide what an attack makes."""


class AdversarialCache:
    """What one attack made of a gallery, on one model, as it is scored: 8-bit where the protocol is.

    Pixels are a memory map and never held whole. An image counts once its captions are written, after its pixels, so a
    stop at any moment loses at most the last batch.

    Args:
        root: cache folder.
        victim: see `victim_digest`.
        attack: with its budget; its code is part of the identity.
        protocol: seed and rounding.
        gallery: what is attacked.
        hashes: of the data set and of the substitutes, see `prepare.Workshop.hashes`.
    """

    def __init__(
        self,
        root: Path,
        victim: str,
        attack: Attack,
        protocol: Protocol,
        gallery: Gallery,
        hashes: Mapping[str, str],
    ) -> None:
        versions = library_versions()
        identity = {
            "victim": victim,
            "attack": [type(attack).__qualname__, {name: repr(value) for name, value in _options(attack).items()}],
            "code": [files_digest(ATTACKS.glob("*.py"), ATTACKS), file_digest(Path(inspect.getfile(type(attack))))],
            "versions": {name: versions[name] for name in LIBRARIES},
            "data": hashes["data"],
            "substitutes": hashes["substitutes"],
            "captions": hashlib.sha256("\n".join(gallery.texts).encode()).hexdigest(),
            "images": len(gallery.pixels),
            "seed": protocol.seed,
            "eight_bit": protocol.eight_bit,
        }
        self._gallery, self._eight_bit = gallery, protocol.eight_bit
        self.folder = root / f"adversarial-{content_hash(identity)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lines = self.folder / "captions.jsonl"
        path, dtype = self.folder / "pixels.npy", np.dtype(np.uint8 if protocol.eight_bit else np.float32)
        pixels = _memory_map(path, gallery.pixels.shape, dtype)
        if pixels is None:  # none yet, or torn as it was made: then no caption has its pixels
            self._lines.unlink(missing_ok=True)
            pixels = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=gallery.pixels.shape)
        self._pixels = pixels
        self._captions = _read_lines(self._lines)

    @property
    def complete(self) -> bool:
        """Whether every image of the gallery is there."""
        return len(self._captions) == len(self._gallery.pixels)

    def add(self, labels: np.ndarray, attacked: Attacked) -> None:
        """Keep a batch.

        Args:
            labels: (images,) places in the gallery, rising.
            attacked: its captions in the gallery's order.
        """
        pixels = attacked.pixels.detach().float()
        self._pixels[labels] = ((pixels * 255).round() if self._eight_bit else pixels).cpu().numpy()
        self._pixels.flush()
        counts = np.bincount(self._gallery.caption_image, minlength=len(self._gallery.pixels))[labels]
        captions = iter(attacked.captions)
        with self._lines.open("a", encoding="utf-8") as file:
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
                own = [next(captions) for _ in range(count)]
                if label not in self._captions:
                    self._captions[label] = own
                    file.write(json.dumps({"image": label, "captions": own}) + "\n")

    def read(self, labels: np.ndarray) -> Attacked:
        """A batch as it was kept, on the CPU.

        Raises:
            KeyError: an image is not there.
        """
        captions = [caption for label in labels.tolist() for caption in self._captions[label]]
        pixels = torch.from_numpy(self._pixels[labels].astype(np.float32))
        return Attacked(pixels / 255 if self._eight_bit else pixels, captions)


@dataclass(frozen=True, eq=False)
class Replay(Attack):
    """Examples made against another model, as an attack on this one."""

    cache: AdversarialCache
    changes: frozenset[str]
    epsilon: float
    words: int | None
    characters: int

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """Read, not made."""
        found = self.cache.read(batch.labels.cpu().numpy())
        return Attacked(found.pixels.to(batch.pixels.device), found.captions)


def replay(made: Attack, cache: AdversarialCache) -> Replay:
    """The examples of a complete cache, with the budget they were made under."""
    return Replay(cache=cache, changes=made.changes, epsilon=made.epsilon, words=made.words, characters=made.characters)


def _options(attack: Attack) -> dict[str, object]:
    """All fields of an attack, whatever its `repr` shows."""
    assert dataclasses.is_dataclass(attack)  # the registry sees to it
    return {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}


def _memory_map(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.memmap | None:
    """The array there, or None if there is none of this kind."""
    try:
        found = np.lib.format.open_memmap(path, mode="r+")
    except (OSError, ValueError):
        return None
    return found if found.shape == shape and found.dtype == dtype else None


def _read_lines(path: Path) -> dict[int, list[str]]:
    """What was written whole; a line torn by a stop is left out, and cut off so that the next one stands alone."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    entries = [json.loads(line) for line in whole.splitlines()]
    return {entry["image"]: entry["captions"] for entry in entries}
