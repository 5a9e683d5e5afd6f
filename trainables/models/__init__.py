"""Model families behind one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from trainables.errors import InputError

Resize = Literal["stretch", "crop"]
"""How squares are made of images, see `data.cache.resized`."""

Part = Literal["all", "image", "text", "fusion"]
"""Of a model: what is trained."""


class RetrievalModel(nn.Module, ABC):
    """An image encoder and a text encoder into one space.

    Contract: pixels are float in [0, 1] and un-normalised (the model normalises inside, so that attack radii mean the
    same everywhere); features are not L2-normalised; the result for a row does not depend on the other rows, nor a
    caption's on its padding; there is no temperature inside. Image, text and fusion parameters are disjoint, and
    together all that can be trained. `save` writes what `load` of the same family reads, weights as safetensors.
    """

    family: ClassVar[str]
    """`clip`, `siglip`, `albef`, `blip` or `dual`; also the name of what is read of captions, see `captions`."""
    resize: Resize = "crop"
    """How its file, or else its publication, makes squares of images."""
    candidates: ClassVar[int | None] = None
    """That its publication re-ranks on COCO; None without fusion."""
    tokenizer: PreTrainedTokenizerBase
    own_temperature: float | None = None
    """The softmax temperature it was trained with, if it keeps one. Nothing here computes with it."""
    guesses: tuple[str, ...] = ()
    """What nothing but a name or a custom says about it, in words, for whoever loads it to tell."""
    temperature_range: ClassVar[tuple[float, float]] = (0.01, 1.0)
    """Where a learned temperature is kept. CLIP's logit scale is at most 100 (Radford et al. 2021, section 2.5)."""

    @property
    def image_pixels(self) -> int | None:
        """Side of the images it was made for; None where it does not say."""
        return None

    @property
    def max_tokens(self) -> int:
        """Where its publication cuts captions, or its longest caption if that is less."""
        return 77

    @property
    def positions(self) -> int | None:
        """Tokens that its text tower can read at most; None if any number."""
        return None

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, dim)."""

    @abstractmethod
    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) token ids and attention mask -> (batch, dim)."""

    @abstractmethod
    def image_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the image side only: the tower and its projection."""

    @abstractmethod
    def text_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the text side only: the tower and its projection."""

    def fusion_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that only scores of an image and a caption together use; none without fusion."""
        return iter(())

    def checkpoint_layers(self) -> None:
        """Keep only what enters a transformer layer, and compute the rest again going back (Chen et al. 2016).

        Also in eval mode, unlike `transformers`' own switch: the training attack goes back to the pixels there.

        Raises:
            InputError: there are no transformer layers.
        """
        layers = [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise InputError(f"training.gradient_checkpointing: {type(self).__name__} here has no transformer layers")
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights, configuration and tokenizer."""


class FusionModel(RetrievalModel):
    """A retrieval model that can also read an image and a caption together: image-text matching (ITM).

    Contract, beside `RetrievalModel`'s: what an encoder computes is computed once. `encode_image` equals
    `image_features` of `image_tokens`, and `itm_logits` goes on from `image_tokens` and `text_tokens`, so neither
    encoder runs again for another pair. Logits of a pair do not depend on the other pairs nor on padding, and have
    gradients to pixels.
    """

    similarity_weight: ClassVar[float]
    """Pairs are ranked by their second ITM logit plus so much of their cosine similarity."""

    @abstractmethod
    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, image tokens, width)."""

    @abstractmethod
    def image_features(self, image_tokens: Tensor) -> Tensor:
        """(batch, image tokens, width) -> (batch, dim), for the similarity to captions."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, dim)."""
        return self.image_features(self.image_tokens(pixels))

    @abstractmethod
    def text_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(captions, length) token ids and attention mask -> (captions, length, width): where the fusion begins."""

    @abstractmethod
    def itm_logits(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Whether images and captions match.

        Args:
            image_tokens: (images, image tokens, width).
            text_tokens: (images x n, length, width), of n captions for each image in turn. The keys and values of an
                image are computed once for all its n.
            mask: (images x n, length) attention mask.

        Returns:
            (images x n, 2): logits of "no match" and "match".
        """


def check_length(model: RetrievalModel, max_tokens: int) -> None:
    """Raise InputError if captions of so many tokens are too long for the model."""
    if model.positions is not None and max_tokens > model.positions:
        raise InputError(f"max_tokens {max_tokens}: this {model.family} reads {model.positions} tokens at most")


def parameters_of(model: RetrievalModel, part: Part) -> list[nn.Parameter]:
    """The parameters a training policy trains.

    Args:
        model: of any family.
        part: `image` and `text` are a tower with its projection, `fusion` what only ITM uses, `all` the three. BLIP's
            text tower is also the greater part of its fusion; only the cross-attention between is `fusion` there.

    Raises:
        InputError: the model has no such part.
    """
    parts = {"image": model.image_parameters, "text": model.text_parameters, "fusion": model.fusion_parameters}
    found = [parameter for name, of in parts.items() if part in (name, "all") for parameter in of()]
    if not found:
        raise InputError(f"{type(model).__name__} has no {part} parameters to train")
    return found


def tokenize(model: RetrievalModel, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each int64 (captions, longest), cut to `max_tokens`, on the CPU."""
    batch = model.tokenizer(list(captions), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]
