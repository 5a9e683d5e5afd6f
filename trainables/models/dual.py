"""A dual encoder: any `transformers` image tower and any text tower, each with a projection into a common space."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedTokenizerBase

from trainables.errors import InputError
from trainables.hub import located
from trainables.models import RetrievalModel
from trainables.models.official import check_weights, from_directory, without_pooler
from trainables.models.tokenizers import load_tokenizer

WIDTH = 256
"""Of the common space."""


class BagOfWords(nn.Module):
    """The normalised mean of learned word embeddings: on small data as good as a transformer, and far cheaper."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) -> (batch, WIDTH)."""
        weights = mask.to(self.embedding.weight.dtype).unsqueeze(1)
        return self.norm((weights @ self.embedding(tokens)).squeeze(1) / weights.sum(-1))


class TextTransformer(nn.Module):
    """The masked mean of a `transformers` text model's last hidden states."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower: Any = tower

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) -> (batch, hidden)."""
        # A mask as attention reads it; `transformers` would look into one (batch, length), and wait for the device.
        ready = self.tower._supports_attention_backend and self.tower.config._attn_implementation == "sdpa"
        seen = mask.bool()[:, None, None] if ready else mask
        states = self.tower(input_ids=tokens, attention_mask=seen).last_hidden_state
        weights = mask.to(states.dtype).unsqueeze(1)
        return (weights @ states).squeeze(1) / weights.sum(-1)


class ImageHead(nn.Module):
    """A projection followed by one residual hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, WIDTH)
        self.hidden = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(batch, width) -> (batch, WIDTH)."""
        projected = self.project(features)
        return projected + self.hidden(projected)


class Dual(RetrievalModel):
    """Two towers and their projections."""

    family = "dual"
    pixel_stats: Tensor

    def __init__(
        self, image_tower: Any, text_tower: nn.Module, tokenizer: PreTrainedTokenizerBase, pixel_stats: Tensor
    ) -> None:
        super().__init__()
        # Convolutions are up to 1.6 times as fast in this layout on CPUs, and made for it on GPUs.
        self.image_tower: Any = image_tower.to(memory_format=torch.channels_last)
        self.text_tower, self.tokenizer = text_tower, tokenizer
        self.register_buffer("pixel_stats", pixel_stats.view(2, 3, 1, 1))
        with torch.no_grad():
            image_width = self.pooled(torch.zeros(1, 3, 96, 96)).shape[1]
            text_width = text_tower(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)).shape[1]
        self.image_head, self.text_head = ImageHead(image_width), nn.Linear(text_width, WIDTH)
        self.train(False)

    def pooled(self, pixels: Tensor) -> Tensor:
        """The image tower's own features, (batch, tower width)."""
        mean, std = self.pixel_stats[0], self.pixel_stats[1]
        normalised = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
        found = self.image_tower(normalised)
        if found.pooler_output is None:  # its checkpoint has no pooler
            return found.last_hidden_state[:, 0]
        return found.pooler_output.flatten(1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, WIDTH)."""
        return self.image_head(self.pooled(pixels))

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) -> (batch, WIDTH)."""
        return self.text_head(self.text_tower(tokens, mask))

    def image_parameters(self) -> Iterator[nn.Parameter]:
        """The image tower and its head."""
        return chain(self.image_tower.parameters(), self.image_head.parameters())

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The text tower and its head."""
        return chain(self.text_tower.parameters(), self.text_head.parameters())

    def train(self, mode: bool = True) -> Dual:
        """Batch norm stays in eval mode: its statistics belong to the pretrained tower."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def save(self, folder: Path) -> None:
        """Write tower configurations, weights and tokenizer."""
        self.image_tower.config.save_pretrained(folder / "image_tower")
        if isinstance(self.text_tower, TextTransformer):
            self.text_tower.tower.config.save_pretrained(folder / "text_tower")
        self.tokenizer.save_pretrained(folder)

        save_model(self, str(folder / "model.safetensors"))

    @classmethod
    def load(cls, name: str) -> Dual:
        """Read what `save` wrote.

        Raises:
            InputError: a tokenizer that does not fit.
            OSError: nothing there.
            RuntimeError: weights that do not fit.
        """
        folder = Path(name)
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            held = set(weights.keys())
            bag = "text_tower.embedding.weight"
            rows = weights.get_slice(bag).get_shape()[0] if bag in held else 0
        image = _configured(folder / "image_tower", {key.removeprefix("image_tower.") for key in held})
        text: nn.Module = BagOfWords(rows)
        if not rows:
            tower = _configured(folder / "text_tower", {key.removeprefix("text_tower.tower.") for key in held})
            text, rows = TextTransformer(tower), tower.get_input_embeddings().num_embeddings
        model = cls(
            image, text, load_tokenizer(folder, rows, first=False), torch.stack([torch.zeros(3), torch.ones(3)])
        )
        load_model(model, str(folder / "model.safetensors"))
        check_weights(model, name)
        return model

    @classmethod
    def from_towers(cls, image_tower: str, text_tower: str | None, tokenizer: PreTrainedTokenizerBase) -> Dual:
        """Pretrained towers (hub ids or directories) with random projections.

        Args:
            image_tower: its image processor's mean and standard deviation are used.
            text_tower: None for a `BagOfWords` over `tokenizer`; otherwise it brings its own tokenizer.
            tokenizer: of the bag of words.

        Raises:
            InputError: weights are missing, a tokenizer does not fit, or the pixels are prepared in another way.
            OSError: nothing there.
        """
        image_tower, text_tower = located(image_tower), text_tower and located(text_tower)
        image = from_directory(AutoModel, image_tower)
        text: nn.Module = BagOfWords(len(tokenizer))
        if text_tower is not None:
            tower = from_directory(AutoModel, text_tower)
            text = TextTransformer(tower)
            tokenizer = load_tokenizer(text_tower, tower.get_input_embeddings().num_embeddings, first=False)
        return cls(image, text, tokenizer, _pixel_stats(image_tower))


def _configured(folder: Path, held: set[str]) -> Any:
    """A tower by its configuration, without the pooler that is not among the weights."""
    tower = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    without_pooler(tower, tower.state_dict().keys() - held)
    return tower


def _pixel_stats(name: str) -> Tensor:
    """Mean and standard deviation (2, 3) that the tower's image processor normalises pixels in [0, 1] with."""
    processor = AutoImageProcessor.from_pretrained(name)
    if not getattr(processor, "do_normalize", False):
        stats = [[0.0] * 3, [1.0] * 3]
    else:
        stats = [processor.image_mean, processor.image_std]
    if getattr(processor, "do_flip_channel_order", False) or any(value is None for value in stats):
        raise InputError(
            f"image tower {name}: pixels are to be prepared as is not done here: {processor.to_json_string()}"
        )
    return torch.tensor(stats)
