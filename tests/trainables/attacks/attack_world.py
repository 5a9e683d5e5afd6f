"""A small world in which every quirk shows: words of several pieces, a long caption, a hesitant language model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, PreTrainedTokenizerBase

from benchmarks.as_published import reading_of, victim_of
from benchmarks.published import attacks as published
from benchmarks.published.words import Reading
from trainables.attacks.contract import Batch, Victim
from trainables.attacks.encoding import CaptionEncoder, encode_captions
from trainables.attacks.proposals import masked_lm_substitutes
from trainables.attacks.quirks import Quirks
from trainables.attacks.substitutes import Substitutes
from trainables.captions import bare_text
from trainables.config import TinyConfig
from trainables.evaluation.robustness import Gallery
from trainables.models import RetrievalModel
from trainables.models.clip import Clip

MAX_TOKENS = 48

CAPTIONS = [
    "A man with a red helmet on a small moped on a dirt road.",
    "Man riding a motorbike on a dirt road in the countryside",
    "A young girl inhales with the intent of blowing out 2 candles!",
    "A kitchen with a stove, a microwave - and a refrigerator",
    "the dirty kitchens of three men with small red stoves and one of the smaller tables where they eat their bread "
    "and drink their coffee before riding over the dusty road to work in a town near the sea with boats",
    "Several bread loaves on wooden tables",
    "A boat sails on the sea near two towns",
    "A dog runs after a ball on the beach",
    "Three dogs are playing with red balls",
]
OWNER = [0, 0, 1, 2, 2, 2, 3, 4, 4]


@dataclass(frozen=True)
class World:
    """A gallery of five images with their captions, the models, and batches of it."""

    model: RetrievalModel
    masked_lm: Any
    tokenizer: PreTrainedTokenizerBase
    pixels: np.ndarray
    captions: list[str] = field(default_factory=lambda: CAPTIONS)
    owner: np.ndarray = field(default_factory=lambda: np.array(OWNER))
    tables: dict[Quirks, Substitutes] = field(default_factory=dict)

    def table(self, quirks: Quirks = frozenset()) -> Substitutes:
        if quirks not in self.tables:
            self.tables[quirks] = masked_lm_substitutes(self.texts, self.masked_lm, self.tokenizer, quirks)
        return self.tables[quirks]

    @property
    def texts(self) -> list[str]:
        return [bare_text(caption) for caption in self.captions]

    @property
    def gallery(self) -> Gallery:
        groups = np.unique(self.texts, return_inverse=True)[1]
        return Gallery(self.pixels, self.owner, groups, self.table(), self.table, bare_text)

    @property
    def victim(self) -> Victim:
        features = encode_captions(self.model, self.texts, MAX_TOKENS, torch.device("cpu"))
        groups = torch.from_numpy(self.gallery.caption_groups)
        with torch.no_grad():
            images = F.normalize(self.model.encode_image(torch.tensor(self.pixels) / 255), dim=-1)
        return Victim(self.model, MAX_TOKENS, features, images, torch.from_numpy(self.owner), groups)

    def batch(self, labels: list[int] | None = None, seed: int = 0) -> Batch:
        chosen = np.arange(len(self.pixels)) if labels is None else np.array(labels)
        rows = np.concatenate([np.flatnonzero(self.owner == label) for label in chosen])
        return Batch(
            pixels=torch.tensor(self.pixels[chosen]) / 255,
            labels=torch.from_numpy(chosen),
            caption_rows=rows,
            owner=torch.tensor([chosen.tolist().index(image) for image in self.owner[rows]]),
            substitutes=self.table(),
            quirky_substitutes=self.table,
            caption_text=bare_text,
            encode=CaptionEncoder(self.model, MAX_TOKENS, torch.device("cpu")),
            seed=seed,
        )

    def permuted(self, images: list[int]) -> World:
        """The same gallery in another order."""
        rows = np.concatenate([np.flatnonzero(self.owner == image) for image in images])
        return replace(
            self,
            pixels=self.pixels[images],
            captions=[self.captions[row] for row in rows],
            owner=np.array([images.index(image) for image in self.owner[rows]]),
            tables={},
        )

    def shortened(self, words: int) -> World:
        """With so many words of each caption."""
        captions = [" ".join(bare_text(caption).split()[:words]) for caption in self.captions]
        return replace(self, captions=captions, tables={})

    def reading(self, quirks: Quirks = frozenset(), candidates: int = 10) -> Reading:
        """How the published code chooses words, under these quirks."""
        return reading_of(self.masked_lm, self.tokenizer, quirks, candidates)

    @property
    def plain_victim(self) -> published.Victim:
        """What the published code attacks."""
        return victim_of(self.model, MAX_TOKENS)


def make_world() -> World:
    torch.manual_seed(0)
    # Every other caption's words are whole; a trained vocabulary would differ from process to process.
    whole = sorted({word for caption in CAPTIONS[::2] for word in bare_text(caption).split()})
    pieces = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + ["##er", "##ing"]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *whole, *"abcdefghijklmnopqrstuvwxyz0123456789'", *pieces]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = BertTokenizer(vocab=vocabulary, bos_token="[CLS]", eos_token="[SEP]")
    model = Clip.tiny(
        TinyConfig(width=32, layers=2, heads=2, patch_pixels=8, embedding=32), 32, MAX_TOKENS, tokenizer
    ).eval()
    masked_lm = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    with torch.no_grad():
        for parameter in [*model.parameters(), *masked_lm.parameters()]:
            if parameter.ndim > 1:
                parameter *= 4  # at their first values they hardly tell one caption from another
        masked_lm.cls.predictions.bias -= 0.4
        masked_lm.cls.predictions.bias[: entries.index("[MASK]") + 1] -= 100  # as a trained one, it proposes none
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    return World(model.requires_grad_(False), masked_lm, tokenizer, pixels)
