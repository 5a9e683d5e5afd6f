"""One small random model of each family, in no time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase, ResNetConfig, ResNetModel

from trainables.config import TinyConfig
from trainables.models import RetrievalModel
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.models.dual import BagOfWords, Dual
from trainables.models.siglip import Siglip

PIXELS, LENGTH = 32, 64
TINY = TinyConfig(width=32, layers=1, heads=2, patch_pixels=8, embedding=16)


def dual(tokenizer: PreTrainedTokenizerBase) -> Dual:
    tower = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    return Dual(tower, BagOfWords(len(tokenizer)), tokenizer, torch.tensor([[0.5] * 3, [0.25] * 3]))


FAMILIES: dict[str, Callable[[PreTrainedTokenizerBase], RetrievalModel]] = {
    "clip": lambda tokenizer: Clip.tiny(TINY, PIXELS, LENGTH, tokenizer),
    "siglip": lambda tokenizer: Siglip.tiny(TINY, PIXELS, LENGTH, tokenizer),
    "dual": dual,
    "blip": lambda tokenizer: Blip.tiny(TINY, PIXELS, LENGTH, tokenizer),
    "albef": lambda tokenizer: Albef.tiny(TINY, PIXELS, LENGTH, tokenizer),
}
