"""What ALBEF and BLIP share: a ViT, a BERT whose layers cross-attend to it, ITC projections and an ITM head."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.blip.modeling_blip import BlipAttention

from trainables.config import TinyConfig
from trainables.errors import InputError
from trainables.models import FusionModel
from trainables.models.official import State, layers, resampled
from trainables.models.patches import PatchEmbedding
from trainables.models.pixels import write_preparation


class FusedAttention(BlipAttention):
    """The same attention without its (tokens, tokens) weights in memory: 577 tokens and 12 heads make 16 MB a layer."""

    def forward(self, hidden_states: Tensor, first_only: bool = False, **_: Any) -> tuple[Tensor, None]:
        """(batch, tokens, width) -> the same, or (batch, 1, width) of the first token only; no weights."""
        joined = self.qkv(hidden_states).unflatten(2, (3, self.num_heads, self.head_dim))
        queries, keys, values = joined.permute(2, 0, 3, 1, 4)
        if first_only:
            queries = queries[:, :, :1]
        dropped = self.dropout.p if self.training else 0.0
        seen = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropped)
        return self.projection(seen.transpose(1, 2).flatten(2)), None


def _attended(attention: Any, states: Tensor, others: Tensor, seen: Tensor | None = None) -> Tensor:
    """A BERT attention with its residual, without weights in memory.

    Args:
        attention: with `self` and `output`.
        states: (rows, queries, width).
        others: (rows, keys, width of their side), what is attended to.
        seen: bool (rows, 1, 1, keys); empty: all.
    """
    own = attention.self
    queries, keys, values = (
        part(given).unflatten(2, (own.num_attention_heads, own.attention_head_size)).transpose(1, 2)
        for part, given in ((own.query, states), (own.key, others), (own.value, others))
    )
    dropped = own.dropout.p if own.training else 0.0
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, dropout_p=dropped)
    return attention.output(mixed.transpose(1, 2).flatten(2), states)


def _layer(
    layer: Any, states: Tensor, seen: Tensor, image_tokens: Tensor | None = None, first_only: bool = False
) -> Tensor:
    """What a text layer makes of the captions' states, (images x n, length, width), or of their first tokens only.

    With image tokens, it fuses.
    """
    states = _attended(layer.attention, states[:, :1] if first_only else states, states, seen)
    if image_tokens is not None:
        # Captions of an image stand in one row, so that its keys and values are computed once for all of them.
        row = states.reshape(len(image_tokens), -1, states.shape[-1])
        states = _attended(layer.crossattention, row, image_tokens).view_as(states)
    return layer.feed_forward_chunk(states)


class VitBert(FusionModel):
    """A fusion model around a `transformers` network with BLIP's names for its parts.

    Args:
        network: has `vision_model`, `text_encoder`, `vision_proj`, `text_proj` and `itm_head`.
        tokenizer: its first token is what the text side is pooled at.
    """

    resize = "stretch"
    candidates = 256
    published_tokens: ClassVar[int]
    mean: Tensor
    std: Tensor
    temperature_range = (0.001, 0.5)
    """As both clamp it in pre-training."""

    def __init__(self, network: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.network: Any = network
        network.vision_model.embeddings.patch_embedding.__class__ = PatchEmbedding
        for layer in network.vision_model.encoder.layers:
            layer.self_attn.__class__ = FusedAttention  # the same weights under the same names
        self.tokenizer = tokenizer
        self.own_temperature = getattr(network.config, "contrastive_temperature", None)
        self._layer: Callable[..., Tensor] = _layer
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1), persistent=False)

    @property
    def image_pixels(self) -> int:
        """See `RetrievalModel`."""
        return self.network.config.vision_config.image_size

    @property
    def max_tokens(self) -> int:
        """See `RetrievalModel`."""
        return min(self.published_tokens, self.positions)

    @property
    def positions(self) -> int:
        """See `RetrievalModel`."""
        return self.network.config.text_config.max_position_embeddings

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, dim); of the last layer only the token that is read."""
        tower = self.network.vision_model
        *below, last = tower.encoder.layers
        states = self._patches(pixels)
        for layer in below:
            states = layer(states)
        first = states[:, :1] + last.self_attn(last.layer_norm1(states), first_only=True)[0]
        first = first + last.mlp(last.layer_norm2(first))
        return self.image_features(tower.post_layernorm(first))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, 1 + patches, width)."""
        tower, states = self.network.vision_model, self._patches(pixels)
        for layer in tower.encoder.layers:
            states = layer(states)
        return tower.post_layernorm(states)

    def _patches(self, pixels: Tensor) -> Tensor:
        own_size = pixels.shape[-1] == self.image_pixels
        return self.network.vision_model.embeddings(
            (pixels - self.mean) / self.std, interpolate_pos_encoding=not own_size
        )

    def image_features(self, image_tokens: Tensor) -> Tensor:
        """(batch, 1 + patches, width) -> (batch, dim): the first token, projected."""
        return self.network.vision_proj(image_tokens[:, 0])

    @abstractmethod
    def fusion_layers(self) -> Iterable[Any]:
        """`BlipTextLayer`s with cross-attention, in order."""

    def itm_logits(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """See `FusionModel`."""
        states = self._through(self.fusion_layers(), text_tokens, mask, image_tokens, first_only=True)
        return self.network.itm_head(states[:, 0])  # all that the head reads

    def _through(
        self,
        layers: Iterable[Any],
        states: Tensor,
        mask: Tensor,
        image_tokens: Tensor | None = None,
        *,
        first_only: bool = False,
    ) -> Tensor:
        """(captions, length, width) through text layers; with `first_only`, (captions, 1, width)."""
        seen = mask[:, None, None].bool()
        *below, last = layers
        for layer in below:
            states = self._layer(layer, states, seen, image_tokens)
        return self._layer(last, states, seen, image_tokens, first_only)

    def checkpoint_layers(self) -> None:
        """See `RetrievalModel`; text layers are called part by part, so they need their own word."""
        super().checkpoint_layers()
        self._layer = partial(checkpoint, _layer, use_reentrant=False)

    def image_parameters(self) -> Iterator[nn.Parameter]:
        """The ViT and its projection."""
        return chain(self.network.vision_model.parameters(), self.network.vision_proj.parameters())

    def save(self, folder: Path) -> None:
        """Write configuration, weights and tokenizer."""
        self.network.config.contrastive_temperature = self.own_temperature
        self.network.save_pretrained(folder)
        write_preparation(folder, self)
        self.tokenizer.save_pretrained(folder)


VIT_RULES = (
    (r"^visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv", r"vision_model.encoder.layers.\1.self_attn.qkv"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj", r"vision_model.encoder.layers.\1.self_attn.projection"),
    (r"^visual_encoder\.blocks", "vision_model.encoder.layers"),
)
"""From the names of ALBEF's and BLIP's ViT to those of `transformers`."""

DROPPED = (
    r"\w+_m\..*",  # momentum copies
    r"image_queue|text_queue|idx_queue|queue_ptr|ptr_queue",
    r"temp",  # kept as `own_temperature`
    r"text_encoder\.(bert\.)?embeddings\.position_ids",  # 0, 1, 2, ...
)
"""What ALBEF's and BLIP's checkpoints hold for going on with their own training."""


def official_config(state: State, text: str, image_pixels: int | None) -> dict[str, Any]:
    """Keyword arguments of the `BlipConfig` that fits; published sizes have 64 channels a head.

    Args:
        state: official names.
        text: prefix of the text encoder's names.
        image_pixels: of a side; those of the checkpoint if not given.
    """
    positions, patch = state["visual_encoder.pos_embed"], state["visual_encoder.patch_embed.proj.weight"].shape[-1]
    width, text_width = positions.shape[2], state["text_proj.weight"].shape[1]
    return {
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": layers(state, "visual_encoder.blocks"),
            "num_attention_heads": width // 64,
            "image_size": image_pixels or round((positions.shape[1] - 1) ** 0.5) * patch,
            "patch_size": patch,
            "layer_norm_eps": 1e-6,  # not the 1e-5 that `transformers` assumes for BLIP
        },
        "text_config": {
            "hidden_size": text_width,
            "intermediate_size": state[f"{text}.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_hidden_layers": layers(state, f"{text}.encoder.layer"),
            "num_attention_heads": text_width // 64,
            "vocab_size": state[f"{text}.embeddings.word_embeddings.weight"].shape[0],
            "max_position_embeddings": state[f"{text}.embeddings.position_embeddings.weight"].shape[0],
            "bos_token_id": None,
            "sep_token_id": None,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
        },
        "image_text_hidden_size": state["vision_proj.weight"].shape[0],
        "contrastive_temperature": _temperature(state),
    }


def _temperature(state: State) -> float | None:
    """What similarities are divided by before the softmax."""
    if "temp" not in state:
        return None
    value = float(state["temp"])
    if not 0 < value < math.inf:
        raise InputError(f"the temperature that the checkpoint holds as temp is {value}")
    return value


def at_size(entries: State, config: Any) -> State:
    """The entries with the ViT's position embeddings for the configured image size."""
    name, vision = "vision_model.embeddings.position_embedding", config.vision_config
    return {**entries, name: resampled(entries[name][0], vision.image_size // vision.patch_size, antialias=False)[None]}


def tiny_config(config: TinyConfig, image_pixels: int, max_tokens: int, vocabulary: int, pad_token: int) -> Any:
    """Keyword arguments of a small `BlipConfig`."""
    tower = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        # BERT's 0.02 is for a width of 768: at 64, activations all but vanish and nothing is learned in minutes.
        "initializer_range": config.width**-0.5,
    }
    return {
        "vision_config": {
            **tower,
            "image_size": image_pixels,
            "patch_size": config.patch_pixels,
            "layer_norm_eps": 1e-6,
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
