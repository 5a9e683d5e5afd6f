"""What an attack is: one small contract for ours, torchattacks' and strangers'."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.candidates import Candidates, numbered
from trainables.attacks.encoding import CaptionEncoder
from trainables.attacks.lexicon import Captions
from trainables.attacks.noise import sample_keys
from trainables.attacks.quirks import SUBSTITUTE_QUIRKS, Quirks
from trainables.attacks.substitutes import SUBSTITUTES, Substitutes
from trainables.captions import CaptionText
from trainables.models import RetrievalModel


@dataclass(frozen=True)
class Victim:
    """The model under attack and the gallery it retrieves from. An attack reads the two encoders' embeddings.

    Attributes:
        model: in eval mode, parameters without gradient.
        max_tokens: where captions are cut.
        text_features: (gallery captions, dim) L2-normalised, of the clean captions.
        image_features: (gallery images, dim) L2-normalised, of the clean images.
        caption_image: (gallery captions,) each one's image.
        caption_groups: int64 (gallery captions,), equal for equal captions: they describe each other's images, too.
    """

    model: RetrievalModel
    max_tokens: int
    text_features: Tensor
    image_features: Tensor
    caption_image: Tensor
    caption_groups: Tensor

    @property
    def images(self) -> int:
        """In the gallery."""
        return len(self.image_features)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> L2-normalised float32 features (batch, dim), with gradient."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)


@dataclass(frozen=True)
class Attacked:
    """What an attack made of a batch, in the batch's order; captions as strings, or as `Captions`."""

    pixels: Tensor
    captions: Sequence[str]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some gallery images with all their captions: what is attacked together.

    Attributes:
        pixels: float (images, 3, height, width) in [0, 1].
        labels: int64 (images,), each image's place in the gallery.
        caption_rows: (captions,) rows of `substitutes`.
        owner: int64 (captions,), each caption's image in this batch.
        substitutes: captions of the gallery and what may replace their words.
        quirky_substitutes: makes the same under `SUBSTITUTE_QUIRKS`; only called if needed.
        caption_text: what makes a caption the text that the model reads.
        encode: captions to L2-normalised features, each encoded once however many attacks ask, see `CaptionEncoder`.
        seed: of the protocol.
        levels: uint8, what `pixels` were made of, where that is at hand.
    """

    pixels: Tensor
    labels: Tensor
    caption_rows: np.ndarray
    owner: Tensor
    substitutes: Substitutes
    quirky_substitutes: Callable[[Quirks], Substitutes]
    caption_text: CaptionText
    encode: CaptionEncoder
    seed: int = 0
    levels: np.ndarray | None = None
    _candidates: dict[tuple[Quirks, int], Candidates] = field(default_factory=dict)
    _results: dict[Attack, Attacked] = field(default_factory=dict)

    def captions(self) -> Captions:
        """The clean captions, as the model reads them."""
        return self.candidates().captions

    def take(self, images: Tensor) -> Batch:
        """Some of its images with their captions; `images` are int64 places in it, rising."""
        captions = torch.isin(self.owner, images)
        return replace(
            self,
            pixels=self.pixels[images],
            labels=self.labels[images],
            caption_rows=self.caption_rows[captions.cpu().numpy()],
            owner=torch.searchsorted(images, self.owner[captions]),
            levels=None if self.levels is None else self.levels[images.cpu().numpy()],
            _candidates={},
            _results={},
        )

    def last_captions(self) -> Tensor:
        """int64 (images,), the last caption of each image; captions of an image stand together."""
        counts = self.owner.bincount(minlength=len(self.pixels))
        return counts.cumsum(0) - 1

    def candidates(self, quirks: Quirks = frozenset(), count: int = SUBSTITUTES) -> Candidates:
        """The captions and what may replace their words: among the best `count` predictions of the language model."""
        changed = quirks & SUBSTITUTE_QUIRKS
        if (changed, count) not in self._candidates:
            table, lexicon = self.quirky_substitutes(changed) if changed else self.substitutes, self.encode.lexicon
            found = Candidates.of(lexicon, *numbered(table, self.caption_rows, lexicon, count))
            self._candidates[changed, count] = found.moved(lambda tensor: tensor.to(self.pixels.device))
        return self._candidates[changed, count]

    def clean_features(self, victim: Victim) -> Tensor:
        """(images, dim) L2-normalised, without gradient."""
        return victim.image_features[self.labels]

    @cached_property
    def keys(self) -> Tensor:
        """int64 (images,), the source of each image's randomness: its pixels, wherever in a gallery it stands."""
        levels = (255 * self.pixels).round().byte().cpu().numpy() if self.levels is None else self.levels
        return self._keys(0, [row.tobytes() for row in levels])

    @cached_property
    def caption_keys(self) -> Tensor:
        """int64 (captions,), the source of each caption's randomness: its text."""
        return self._keys(1, [caption.encode() for caption in self.captions()])

    def _keys(self, stream: int, contents: Sequence[bytes]) -> Tensor:
        return sample_keys(
            self.seed, stream, torch.tensor([zlib.crc32(content) for content in contents], device=self.labels.device)
        )

    def once(self, attack: Attack, victim: Victim) -> Attacked:
        """The attack's result, computed the first time. Some are made of attacks that are measured themselves."""
        if attack not in self._results:
            self._results[attack] = attack.run(victim, self)
        return self._results[attack]


class Attack(ABC):
    """An attack. Subclasses are frozen dataclasses; their fields are what a config may set.

    Fields `epsilon`, `words`, `steps` and `candidates` without a default are filled from the protocol. With one they
    are the attack's own, whatever the protocol allows others.

    Contract, checked on everything that is scored: pixels move by at most `epsilon` and stay in [0, 1]; at most `words`
    words of a caption change, any number if it is None, or, if `characters` is above 0, its Levenshtein distance is at
    most that. What is not in `changes` comes back as it was. A sample's result depends on the sample, its own captions
    and images, the clean gallery and the seed, not on the rest of the batch.
    """

    changes: frozenset[str]
    """Of `image` and `text`."""

    known_quirks: ClassVar[Quirks] = frozenset()
    """Those of its published code; `quirks: compat` turns all of them on in attacks that have a field `quirks`."""

    alone: ClassVar[bool] = True
    """Whether a sample's result is the same in whatever batch it is attacked."""

    epsilon: float = 0.0
    words: int | None = 0
    characters: int = 0

    @abstractmethod
    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """Attack a batch. The victim's model is in eval mode and its parameters need no gradient."""
