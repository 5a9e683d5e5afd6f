"""What the benchmarks of attacks run on: real captions, a small CLIP and masked language model made on the spot."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPEncoderLayer

from trainables.attacks.contract import Batch, Victim
from trainables.attacks.encoding import CaptionEncoder, encode_captions
from trainables.attacks.proposals import masked_lm_substitutes
from trainables.attacks.quirks import Quirks
from trainables.attacks.substitutes import Substitutes
from trainables.captions import bare_text
from trainables.config import TEST, DataConfig, PretrainConfig, TinyConfig
from trainables.data import Split, load_dataset
from trainables.models.clip import Clip
from trainables.training.pretraining import make_masked_lm, make_tokenizer

MAX_TOKENS = 77
"""Of CLIP's text tower; the published code pads every caption to it."""

IMAGE_PIXELS = 64

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Result = TypeVar("Result")


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of processor time and the result: on one thread, what else runs on the machine hardly matters."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


class Plain(Clip):
    """CLIP as `transformers` computes it, and so the published code."""

    def __init__(self, clip: Clip) -> None:
        super().__init__(copy.deepcopy(clip.clip), clip.tokenizer)
        self.clip.vision_model.embeddings.patch_embedding.__class__ = nn.Conv2d
        for tower in (self.clip.vision_model, self.clip.text_model):
            tower.encoder.layers[-1].__class__ = CLIPEncoderLayer
            for layer in tower.encoder.layers:
                layer.mlp.__class__ = CLIPMLP

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) -> (batch, dim)."""
        return self.clip.get_text_features(tokens, attention_mask=mask).pooler_output


def read_captions(path: Path) -> list[str]:
    """All captions of a list of {"image", "caption": [...]}, cleaned."""
    return [bare_text(text) for entry in json.loads(path.read_text(encoding="utf-8")) for text in entry["caption"]]


@dataclass(frozen=True)
class Models:
    """A CLIP of the quickstart's size with random weights, and a masked language model trained for one epoch."""

    clip: Clip
    masked_lm: Any
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def make(cls, captions: list[str], tiny: TinyConfig) -> Models:
        """From the captions."""
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as name:
            tokens, masked_lm = Path(name) / "tokens", Path(name) / "masked_lm"
            make_tokenizer(tokens, captions)
            make_masked_lm(masked_lm, captions[:4000], tokens, PretrainConfig(mlm_epochs=1), lambda line: None)
            tokenizer = AutoTokenizer.from_pretrained(tokens)
            clip = Clip.tiny(tiny, IMAGE_PIXELS, MAX_TOKENS, tokenizer).eval()
            return cls(clip, AutoModelForMaskedLM.from_pretrained(masked_lm).eval(), tokenizer)

    def table(self, captions: list[str], quirks: Quirks) -> Substitutes:
        """What may replace the captions' words."""
        return masked_lm_substitutes(captions, self.masked_lm, self.tokenizer, quirks)


def read_images(root: Path, images: int, size: int) -> list[Split]:
    """The first test images of a COCO-format folder with their captions, cleaned, in parts of `size` images."""
    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(root=root, image_pixels=IMAGE_PIXELS, max_train_images=1, eval_split=TEST)
        data = load_dataset(config, Path(cache)).evaluation
        parts = []
        for first in range(0, images, size):
            own = slice(first, min(first + size, images))
            rows = np.flatnonzero((own.start <= data.caption_image) & (data.caption_image < own.stop))
            captions = [bare_text(data.captions[row]) for row in rows]
            owner = data.caption_image[rows] - first
            pixels = np.array(data.pixels[own])
            parts.append(Split(data.image_ids[own], captions, data.caption_ids[rows], owner, pixels))
        return parts


def make_batch(models: Models, pairs: Split, table: Substitutes) -> tuple[Victim, Batch]:
    """All the pairs as one batch, and the models as its victim; `table` serves with quirks and without."""
    owner, device = torch.from_numpy(pairs.caption_image), torch.device("cpu")
    features = encode_captions(models.clip, pairs.captions, MAX_TOKENS, device)
    batch = Batch(
        pixels=torch.from_numpy(pairs.pixels) / 255,
        labels=torch.arange(len(pairs.pixels)),
        caption_rows=np.arange(len(pairs.captions)),
        owner=owner,
        substitutes=table,
        quirky_substitutes=lambda quirks: table,
        caption_text=bare_text,
        encode=CaptionEncoder(models.clip, MAX_TOKENS, device),
    )
    with torch.no_grad():
        images = F.normalize(models.clip.encode_image(batch.pixels).float(), dim=-1)
    groups = torch.from_numpy(np.unique(pairs.captions, return_inverse=True)[1])
    return Victim(models.clip, MAX_TOKENS, features, images, owner, groups), batch
