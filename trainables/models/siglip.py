"""SigLIP (Zhai et al. 2023): `transformers.SiglipModel` from a hub id, a directory, or built tiny."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, SiglipConfig, SiglipModel

from trainables.config import TinyConfig
from trainables.models import RetrievalModel
from trainables.models.clip import tiny_towers, write_temperature
from trainables.models.official import from_directory
from trainables.models.pixels import write_preparation
from trainables.models.tokenizers import load_tokenizer


class Siglip(RetrievalModel):
    """A `transformers` SigLIP; the trial owns the temperature, so neither scale nor bias of its own is used.

    Captions are filled up to the full length and read without a mask, as the published models were trained: they are
    pooled at the last place, which is padding in all but the longest captions.
    """

    family = "siglip"
    resize = "stretch"

    mean: Tensor
    std: Tensor

    def __init__(self, siglip: SiglipModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.siglip, self.tokenizer = siglip, tokenizer
        self.siglip.logit_scale.requires_grad_(False)
        self.siglip.logit_bias.requires_grad_(False)
        self.own_temperature = math.exp(-self.siglip.logit_scale.item())
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5), persistent=False)
        self.register_buffer("std", torch.full((3, 1, 1), 0.5), persistent=False)

    @property
    def image_pixels(self) -> int:
        """See `RetrievalModel`."""
        return self.siglip.config.vision_config.image_size

    @property
    def max_tokens(self) -> int:
        """See `RetrievalModel`."""
        return self.positions

    @property
    def positions(self) -> int:
        """See `RetrievalModel`."""
        return self.siglip.config.text_config.max_position_embeddings

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, dim)."""
        own_size = pixels.shape[-1] == self.image_pixels
        return self.siglip.get_image_features(
            (pixels - self.mean) / self.std, interpolate_pos_encoding=not own_size
        ).pooler_output

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) -> (batch, dim)."""
        missing, pad = (
            self.siglip.config.text_config.max_position_embeddings - tokens.shape[1],
            self.tokenizer.pad_token_id,
        )
        return self.siglip.get_text_features(
            F.pad(tokens.masked_fill(mask == 0, pad), (0, missing), value=pad)
        ).pooler_output

    def image_parameters(self) -> Iterator[nn.Parameter]:
        """The vision tower, pooling included."""
        return self.siglip.vision_model.parameters()

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The text tower and its projection."""
        return self.siglip.text_model.parameters()

    def save(self, folder: Path) -> None:
        """Write a directory that `transformers` and `Siglip.load` read."""
        write_temperature(self.siglip.logit_scale, self.own_temperature)
        self.siglip.save_pretrained(folder)
        write_preparation(folder, self)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, name: str) -> Siglip:
        """From a hub id or a directory.

        Raises:
            InputError: a checkpoint that lacks weights.
            OSError: nothing there.
        """
        siglip = from_directory(SiglipModel, name)
        return cls(siglip, load_tokenizer(name, siglip.config.text_config.vocab_size, first=False))

    @classmethod
    def tiny(cls, config: TinyConfig, image_pixels: int, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Siglip:
        """A small random one over the tokenizer's vocabulary; its embeddings are as wide as its towers."""
        text, vision = tiny_towers(config, image_pixels, max_tokens, tokenizer)
        return cls(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), tokenizer)
