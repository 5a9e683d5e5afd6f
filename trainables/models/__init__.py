"""Model families behind one small interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


class RetrievalModel(nn.Module):
    """An image encoder and a text encoder into one space.

    Contract: pixels are float in [0, 1] and un-normalised (the model normalises inside, so that attack radii mean the
    same everywhere); features are not L2-normalised; the result for a row does not depend on the other rows; there is
    no temperature inside. `save` writes what `load` of the same family reads, weights as safetensors.
    """

    tokenizer: PreTrainedTokenizerBase
    own_temperature: float | None = None
    """The softmax temperature it was trained with, if it keeps one. Nothing here computes with it."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, dim)."""
        raise NotImplementedError

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) token ids and attention mask -> (batch, dim)."""
        raise NotImplementedError

    def image_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the image side only."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write weights, configuration and tokenizer."""
        raise NotImplementedError


def tokenize(model: RetrievalModel, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each int64 (captions, longest), cut to `max_tokens`, on the CPU."""
    batch = model.tokenizer(list(captions), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]
