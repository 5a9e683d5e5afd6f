"""CLIP: `transformers.CLIPModel` from a hub id, a directory, the file of OpenAI or open_clip, or built tiny."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPEncoderLayer

from trainables.config import TinyConfig
from trainables.errors import InputError
from trainables.models import RetrievalModel
from trainables.models.official import (
    State,
    fill,
    from_directory,
    layers,
    renamed,
    resampled,
    tokenizer_beside,
)
from trainables.models.open_clip import Computation, computation
from trainables.models.patches import PatchEmbedding
from trainables.models.pixels import write_preparation
from trainables.models.tokenizers import load_tokenizer

RULES = (
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),  # sic
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
"""From OpenAI's names to those of `transformers`."""

DROPPED = ("input_resolution", "context_length", "vocab_size")

OLD_END = 2
"""The wrong end-of-text token of early configurations of `transformers`; it is the highest one."""


def _separated(state: State) -> State:
    """Queries, keys and values by themselves, and projections as `nn.Linear` has them."""
    entries: State = {}
    for name, tensor in state.items():
        stem, joined, kind = name.partition(".in_proj_")
        if joined:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                entries[f"{stem}.{letter}_proj.{kind}"] = part
        else:
            entries[name] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    return entries


def _official_config(state: State, said: Computation, image_pixels: int | None) -> dict[str, Any]:
    positions, patch = state["visual.positional_embedding"], state["visual.conv1.weight"].shape[-1]
    length, text_width = state["positional_embedding"].shape
    width, vocabulary = positions.shape[1], state["token_embedding.weight"].shape[0]

    def tower(prefix: str, channels: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": channels,
            "intermediate_size": state[f"{prefix}.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": layers(state, prefix),
            "num_attention_heads": heads,
            "hidden_act": said.activation,
        }

    # 64 channels a head, but 16 heads in the images towers that are wider than L: H has 80 channels, g 88, G 104.
    vision = tower("visual.transformer.resblocks", width, said.vision_heads or min(width // 64, 16))
    return {
        "vision_config": {
            **vision,
            "image_size": image_pixels or round((len(positions) - 1) ** 0.5) * patch,
            "patch_size": patch,
        },
        "text_config": {
            **tower("transformer.resblocks", text_width, said.text_heads or text_width // 64),
            "vocab_size": vocabulary,
            "max_position_embeddings": length,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
        "projection_dim": state["text_projection"].shape[1],
    }


def _check_end(tokenizer: PreTrainedTokenizerBase, clip: CLIPModel, name: str | Path) -> None:
    """The text tower is read at its end-of-text token, wherever that is; at the first token if there is none."""
    tokens = tokenizer(["a"])["input_ids"][0]
    read = clip.text_model.eos_token_id
    if tokens[-1] != (max(tokens) if read == OLD_END else read):
        raise InputError(
            f"the tokenizer of {name} does not fit its model: captions end with "
            f"{tokenizer.convert_ids_to_tokens(tokens[-1])} ({tokens[-1]}), the model is read at token {read}"
        )


def tiny_towers(
    config: TinyConfig, image_pixels: int, max_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Text and vision configuration of a small CLIP or SigLIP over the tokenizer's vocabulary."""
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
    return text, {**tower, "image_size": image_pixels, "patch_size": config.patch_pixels}


def write_temperature(logit_scale: Tensor, temperature: float | None) -> None:
    """Put it where it is read from, unless it is there to the bit."""
    if temperature is not None and math.exp(-logit_scale.item()) != temperature:
        logit_scale.data.fill_(-math.log(temperature))


class PooledLayer(CLIPEncoderLayer):
    """The last layer of a tower that is read at one token, computed for that token alone.

    The same weights under the same names. Of a layer's work, only keys and values are needed for every token.
    """

    def forward(self, hidden_states: Tensor, *_: Any, at: Tensor | None = None, **__: Any) -> Tensor:
        """(batch, tokens, width) -> (batch, 1, width).

        Args:
            hidden_states: of the layer below.
            at: int64 (batch,), the token that is read, and the last one that is seen; empty: the first, which sees all.
        """
        attention, normal = self.self_attn, self.layer_norm1(hidden_states)
        if at is None:
            read, own, seen = hidden_states[:, :1], normal[:, :1], None
        else:
            rows = torch.arange(len(at), device=at.device)
            read, own = hidden_states[rows, at][:, None], normal[rows, at][:, None]
            seen = (torch.arange(hidden_states.shape[1], device=at.device) <= at[:, None])[:, None, None]
        queries, keys, values = (
            part.unflatten(2, (attention.num_heads, attention.head_dim)).transpose(1, 2)
            for part in (attention.q_proj(own), attention.k_proj(normal), attention.v_proj(normal))
        )
        dropped = attention.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, dropout_p=dropped)
        attended = read + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        return attended + self.mlp(self.layer_norm2(attended))


class QuickMlp(CLIPMLP):
    """The same where the activation is QuickGELU: x sigmoid(c x) = SiLU(c x) / c, one pass over the inner states.

    The matrix products before and after take the factors along. Equal to rounding, with the same weights under the same
    names.
    """

    FACTOR = 1.702
    """Of QuickGELU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        rows, bias, weight = hidden_states.flatten(0, 1), self.fc1.bias, self.fc1.weight.T
        inner = torch.addmm(bias, rows, weight, beta=self.FACTOR, alpha=self.FACTOR)
        outer = torch.addmm(self.fc2.bias, F.silu(inner), self.fc2.weight.T, alpha=1 / self.FACTOR)
        return outer.view_as(hidden_states)


class Clip(RetrievalModel):
    """A `transformers` CLIP; the trial owns the temperature, so CLIP's own is not used."""

    family = "clip"
    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.clip = clip
        clip.vision_model.embeddings.patch_embedding.__class__ = PatchEmbedding
        for tower in (clip.vision_model, clip.text_model):
            tower.encoder.layers[-1].__class__ = PooledLayer
            if tower.config.hidden_act == "quick_gelu":
                for layer in tower.encoder.layers:
                    layer.mlp.__class__ = QuickMlp
        self.clip.logit_scale.requires_grad_(False)
        self.own_temperature = math.exp(-self.clip.logit_scale.item())
        self.tokenizer = tokenizer
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1), persistent=False)

    @property
    def image_pixels(self) -> int:
        """See `RetrievalModel`."""
        return self.clip.config.vision_config.image_size

    @property
    def max_tokens(self) -> int:
        """See `RetrievalModel`."""
        return self.positions

    @property
    def positions(self) -> int:
        """See `RetrievalModel`."""
        return self.clip.config.text_config.max_position_embeddings

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, dim)."""
        own_size = pixels.shape[-1] == self.image_pixels
        return self.clip.get_image_features(
            (pixels - self.mean) / self.std, interpolate_pos_encoding=not own_size
        ).pooler_output

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) -> (batch, dim). What stands after the end-of-text token is not seen, so nor is padding."""
        tower = self.clip.text_model
        ends = tokens.argmax(1) if tower.eos_token_id == OLD_END else (tokens == tower.eos_token_id).int().argmax(1)
        *below, last = tower.encoder.layers
        hidden = tower.embeddings(input_ids=tokens)
        for layer in below:
            hidden = layer(hidden, None, is_causal=True)
        return self.clip.text_projection(tower.final_layer_norm(last(hidden, at=ends)[:, 0]))

    def image_parameters(self) -> Iterator[nn.Parameter]:
        """The vision tower and its projection."""
        return chain(self.clip.vision_model.parameters(), self.clip.visual_projection.parameters())

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The text tower and its projection."""
        return chain(self.clip.text_model.parameters(), self.clip.text_projection.parameters())

    def save(self, folder: Path) -> None:
        """Write a directory that `transformers` and `Clip.load` read."""
        write_temperature(self.clip.logit_scale, self.own_temperature)
        self.clip.save_pretrained(folder)
        write_preparation(folder, self)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, name: str) -> Clip:
        """From a hub id or a directory.

        Raises:
            OSError: nothing there, or not a CLIP.
        """
        clip = from_directory(CLIPModel, name)
        tokenizer = load_tokenizer(name, clip.config.text_config.vocab_size)
        _check_end(tokenizer, clip, name)
        return cls(clip, tokenizer)

    @classmethod
    def from_official(cls, state: State, path: Path, image_pixels: int | None) -> Clip:
        """From the entries of OpenAI's or open_clip's state dict of a CLIP with a ViT.

        Args:
            state: see `official.read_state`.
            path: for messages, the activation and the tokenizer beside it.
            image_pixels: of a side; the position embeddings are resampled to it, as open_clip does.

        Raises:
            InputError: entries that do not fit, or nothing says how they compute, see `open_clip.computation`.
        """
        said = computation(state, path)
        config = CLIPConfig(**_official_config(state, said, image_pixels))
        vision = config.vision_config
        entries = renamed(_separated(state), RULES, DROPPED)
        positions = "vision_model.embeddings.position_embedding.weight"
        entries[positions] = resampled(entries[positions], vision.image_size // vision.patch_size, antialias=True)
        clip = CLIPModel(config)
        fill(clip, entries, path)
        rows = config.text_config.vocab_size
        tokenizer = tokenizer_beside(path, CLIPTokenizer, "openai/clip-vit-base-patch32", rows)
        _check_end(tokenizer, clip, path)
        model = cls(clip, tokenizer)
        model.guesses = (said.guess,) if said.guess else ()
        return model

    @classmethod
    def tiny(cls, config: TinyConfig, image_pixels: int, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Clip:
        """A small random one over the tokenizer's vocabulary."""
        text, vision = tiny_towers(config, image_pixels, max_tokens, tokenizer)
        return cls(
            CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.embedding)),
            tokenizer,
        )
