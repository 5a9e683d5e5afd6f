"""BLIP (Li et al. 2022): `transformers.BlipForImageTextRetrieval` from a hub id, a directory or the official file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, PreTrainedTokenizerBase

from trainables.config import TinyConfig
from trainables.models.fusion import DROPPED, VIT_RULES, VitBert, at_size, official_config, tiny_config
from trainables.models.official import State, fill, from_directory, renamed, tokenizer_beside
from trainables.models.tokenizers import load_tokenizer


class Blip(VitBert):
    """Every text layer cross-attends where an image is given, so the fusion starts from the caption's embeddings.

    The vocabulary ends with the two tokens BLIP adds to BERT's, `[DEC]` and `[ENC]`. As in the published evaluation,
    `[ENC]` takes the place of the first token in what is fused (which `transformers` leaves out), and a pair's score
    is its ITM logit plus its cosine similarity. Published captions are cut to 35 tokens.
    """

    family = "blip"
    similarity_weight = 1.0
    published_tokens = 35

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) -> (batch, dim)."""
        states = self.network.text_encoder.embeddings(tokens)
        return self.network.text_proj(self._through(self.fusion_layers(), states, mask, first_only=True)[:, 0])

    def text_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(captions, length) -> the embeddings (captions, length, width), `[ENC]` first."""
        tokens = tokens.clone()
        tokens[:, 0] = self.network.config.text_config.vocab_size - 1
        return self.network.text_encoder.embeddings(tokens)

    def fusion_layers(self) -> Iterable[Any]:
        """All layers of the text encoder."""
        return self.network.text_encoder.encoder.layer

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The text encoder but its cross-attention, and its projection."""
        crossing = {id(parameter) for parameter in self._cross_attention()}
        encoder = (p for p in self.network.text_encoder.parameters() if id(p) not in crossing)
        return chain(encoder, self.network.text_proj.parameters())

    def fusion_parameters(self) -> Iterator[nn.Parameter]:
        """The cross-attention and the ITM head."""
        return chain(self._cross_attention(), self.network.itm_head.parameters())

    def _cross_attention(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(layer.crossattention.parameters() for layer in self.fusion_layers())

    @classmethod
    def load(cls, name: str) -> Blip:
        """From a hub id or a directory.

        Raises:
            OSError: nothing there, or not a BLIP.
        """
        config = BlipConfig.from_pretrained(name)
        guesses = _as_published(config)
        network = from_directory(BlipForImageTextRetrieval, name, config=config)
        model = cls(network, load_tokenizer(name, network.config.text_config.vocab_size))
        model.guesses = guesses
        return model

    @classmethod
    def from_official(cls, state: State, path: Path, image_pixels: int | None) -> Blip:
        """From the entries of a published `.pth` file, fine-tuned for retrieval or pre-trained.

        Args:
            state: see `official.read_state`.
            path: for messages and the tokenizer beside it.
            image_pixels: of a side; the position embeddings are resampled to it.

        Raises:
            InputError: entries that do not fit.
        """
        network = BlipForImageTextRetrieval(BlipConfig(**official_config(state, "text_encoder", image_pixels)))
        entries = renamed(state, VIT_RULES, [*DROPPED, r"text_decoder\..*"])
        fill(network, at_size(entries, network.config), path)
        rows = network.config.text_config.vocab_size
        return cls(network, tokenizer_beside(path, BertTokenizer, "google-bert/bert-base-uncased", rows))

    @classmethod
    def tiny(cls, config: TinyConfig, image_pixels: int, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Blip:
        """A small random one over the tokenizer's vocabulary and the two further tokens."""
        values = tiny_config(config, image_pixels, max_tokens, len(tokenizer) + 2, tokenizer.pad_token_id)
        return cls(BlipForImageTextRetrieval(BlipConfig(**values)), tokenizer)


def _as_published(config: BlipConfig) -> tuple[str, ...]:
    """Correct what `transformers` assumes for BLIP and its converted weights were not trained with.

    The published ViT has a LayerNorm epsilon of 1e-6 and the published BERT 12 heads (`models/vit.py` and
    `configs/med_config.json` of salesforce/BLIP); the defaults are 1e-5 and 8, and conversions wrote them down
    (huggingface/transformers#22625, salesforce/LAVIS#106).
    """
    vision, text = config.vision_config, config.text_config
    guesses = []
    if vision.layer_norm_eps == 1e-5:
        vision.layer_norm_eps = 1e-6
        guesses.append("LayerNorm epsilon 1e-6 in the ViT, as BLIP was trained, not the 1e-5 of its configuration")
    if (text.hidden_size, text.num_attention_heads) == (768, 8):
        text.num_attention_heads = 12
        guesses.append("12 attention heads in the text encoder, as BLIP was trained, not the 8 of its configuration")
    return tuple(guesses)
