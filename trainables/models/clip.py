"""CLIP: `transformers.CLIPModel` from a hub id, a local directory, or built tiny."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from trainables.config import TinyConfig
from trainables.models import RetrievalModel


class Clip(RetrievalModel):
    """A `transformers` CLIP; the trial owns the temperature, so CLIP's own is not used."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.clip = clip
        self.clip.logit_scale.requires_grad_(False)
        self.own_temperature = math.exp(-self.clip.logit_scale.item())
        self.tokenizer = tokenizer
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1), persistent=False)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, dim)."""
        own_size = pixels.shape[-1] == self.clip.config.vision_config.image_size
        return self.clip.get_image_features(
            (pixels - self.mean) / self.std, interpolate_pos_encoding=not own_size
        ).pooler_output

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) -> (batch, dim)."""
        return self.clip.get_text_features(tokens, attention_mask=mask).pooler_output

    def image_parameters(self) -> Iterator[nn.Parameter]:
        """The vision tower and its projection."""
        return chain(self.clip.vision_model.parameters(), self.clip.visual_projection.parameters())

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The text tower and its projection."""
        return chain(self.clip.text_model.parameters(), self.clip.text_projection.parameters())

    def save(self, folder: Path) -> None:
        """Write a directory that `transformers` and `Clip.load` read."""
        self.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, name: str) -> Clip:
        """From a hub id or a directory.

        Raises:
            OSError: nothing there, or not a CLIP.
        """
        return cls(CLIPModel.from_pretrained(name, use_safetensors=True), AutoTokenizer.from_pretrained(name))

    @classmethod
    def tiny(cls, config: TinyConfig, image_pixels: int, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Clip:
        """A small random one over the tokenizer's vocabulary."""
        tower = {
            "hidden_size": config.width,
            "intermediate_size": 4 * config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
        }
        text = {
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max_tokens,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        vision = {**tower, "image_size": image_pixels, "patch_size": config.patch_pixels}
        return cls(
            CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.embedding)),
            tokenizer,
        )
