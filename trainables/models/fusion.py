"""What ALBEF and BLIP share: a ViT, a BERT whose layers cross-attend to it, ITC projections and an ITM head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from trainables.config import TinyConfig
from trainables.models import FusionModel


class VitBert(FusionModel):
    """A fusion model around a `transformers` network with BLIP's names for its parts.

    Args:
        network: has `vision_model`, `text_encoder`, `vision_proj`, `text_proj` and `itm_head`.
        tokenizer: its first token is what the text side is pooled at.
    """

    mean: Tensor
    std: Tensor
    temperature_range = (0.001, 0.5)
    """As both clamp it in pre-training."""

    def __init__(self, network: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.network: Any = network
        self.tokenizer = tokenizer
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1), persistent=False)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, 1 + patches, width)."""
        own_size = pixels.shape[-1] == self.network.config.vision_config.image_size
        return self.network.vision_model(
            (pixels - self.mean) / self.std, interpolate_pos_encoding=not own_size
        ).last_hidden_state

    def image_features(self, image_tokens: Tensor) -> Tensor:
        """(batch, 1 + patches, width) -> (batch, dim): the first token, projected."""
        return self.network.vision_proj(image_tokens[:, 0])

    def fusion_layers(self) -> Iterable[Any]:
        """`BlipTextLayer`s with cross-attention, in order."""
        raise NotImplementedError

    def itm_logits(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """See `FusionModel`."""
        states, images = text_tokens, len(image_tokens)
        unseen = (1.0 - mask.to(states.dtype)[:, None, None]) * torch.finfo(states.dtype).min
        *layers, last = self.fusion_layers()
        for layer in (*layers, last):
            states, _ = layer.attention(states, unseen)
            if layer is last:
                states = states[:, :1]  # all that the head reads
            # Captions of an image stand in one row, so that its keys and values are computed once for all of them.
            row = states.reshape(images, -1, states.shape[-1])
            states = layer.crossattention(row, encoder_hidden_states=image_tokens)[0].view_as(states)
            states = layer.feed_forward_chunk(states)
        return self.network.itm_head(states[:, 0])

    def image_parameters(self) -> Iterator[nn.Parameter]:
        """The ViT and its projection."""
        return chain(self.network.vision_model.parameters(), self.network.vision_proj.parameters())

    def save(self, folder: Path) -> None:
        """Write configuration, weights and tokenizer."""
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def tiny_config(config: TinyConfig, image_pixels: int, max_tokens: int, vocabulary: int, pad_token: int) -> Any:
    """Keyword arguments of a small `BlipConfig`."""
    tower = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
    }
    return {
        "vision_config": {
            **tower,
            "image_size": image_pixels,
            "patch_size": config.patch_pixels,
            "layer_norm_eps": 1e-6,
            "initializer_range": 0.02,
        },
        "text_config": {
            **tower,
            "vocab_size": vocabulary,
            "max_position_embeddings": max_tokens,
            "pad_token_id": pad_token,
            "bos_token_id": None,
            "sep_token_id": None,
        },
        "image_text_hidden_size": config.embedding,
    }
