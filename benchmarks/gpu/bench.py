"""What the parts share: sizes, models and pixels of random numbers, and rows of the table."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from study.costs.cost_model import Shape
    from trainables.config import ModelConfig, Protocol, TrainingConfig, TrialConfig
    from trainables.models import RetrievalModel
    from trainables.prepare import Prepared
    from trainables.results import TrialResult

FAMILIES = ("clip", "albef", "blip")
PUBLISHED: dict[str, dict[str, Any]] = {
    "clip": {"base": "openai/clip-vit-base-patch16", "max_tokens": 77},
    "albef": {"family": "albef", "base": "ALBEF.pth", "max_tokens": 30},
    "blip": {"family": "blip", "base": "Salesforce/blip-itm-base-coco", "max_tokens": 35},
}
"""As in the presets; only the shapes are taken from there."""
TINY = {"width": 32, "layers": 2, "heads": 2, "patch_pixels": 8, "embedding": 32}
EPSILON = 2 / 255


@dataclass(frozen=True)
class Row:
    """A line of the table: numbers by name, whose ending is the unit, and what there is to say."""

    part: str
    name: str
    values: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        """With three digits."""
        shown = "  ".join(f"{name} {value:.3g}" for name, value in self.values.items())
        return f"({self.part}) {self.name:34} {shown}" + (f"\n{'':8}{self.note}" if self.note else "")


@contextmanager
def timed_calls(owner: Any, name: str, device: torch.device) -> Iterator[list[float]]:
    """Seconds of every call of the owner's function within, with what it has the device do."""
    from trainables.measure import synchronise

    seconds: list[float] = []
    call = getattr(owner, name)

    def timed(*given: Any, **named: Any) -> Any:
        synchronise(device)
        start = time.perf_counter()
        found = call(*given, **named)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
        return found

    with patch.object(owner, name, timed):
        yield seconds


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        pixels: of an image's side, by family.
        batches: of the training step.
        chunked: family, batch and micro-batch of a step that fits only in micro-batches.
        steps: that are timed.
        words: of the made-up language.
        gallery: images that are attacked.
        published_images: that the published loop attacks.
        candidates: of re-ranking, and images of its gallery.
        captions: that substitutes are proposed for.
        masked_lm: sizes of the masked language model.
        memorised: images that the comparison of precisions learns by heart.
        memorising_steps: it takes.
    """

    pixels: dict[str, int]
    batches: tuple[int, ...]
    chunked: tuple[str, int, int]
    steps: int
    words: int
    gallery: int
    published_images: int
    candidates: int
    captions: int
    masked_lm: dict[str, int]
    memorised: int
    memorising_steps: int


BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = Size(
    pixels={"clip": 224, "albef": 384, "blip": 384},
    batches=(128, 1024),
    chunked=("clip", 4096, 256),
    steps=3,
    words=30_000,
    gallery=1000,
    published_images=8,
    candidates=256,
    captions=4000,
    masked_lm=BERT_BASE,
    memorised=200,
    memorising_steps=150,
)
SMALL = Size(
    pixels=dict.fromkeys(FAMILIES, 32),
    batches=(8, 16),
    chunked=("clip", 32, 8),
    steps=2,
    words=300,
    gallery=16,
    published_images=2,
    candidates=8,
    captions=40,
    masked_lm={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    memorised=16,
    memorising_steps=60,
)


@dataclass
class Bench:
    """Makes what the parts measure. Everything that needs more than PyTorch is imported where it is used.

    Attributes:
        device: that is measured.
        tiny: whether everything is small, to be tried on a CPU.
        steps: measured training steps by family, of the largest batch that fits.
    """

    device: torch.device
    tiny: bool
    steps: dict[str, tuple[TrialConfig, TrialResult]] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        """Of everything."""
        return SMALL if self.tiny else LARGE

    @cached_property
    def peak(self) -> float:
        """FLOPs a second of large products of matrices, measured."""
        from trainables.measure import matmul_flops

        return matmul_flops(self.device)

    @cached_property
    def words(self) -> list[str]:
        """Of the made-up language."""
        from trainables.synthetic import made_up_words

        return made_up_words(self.size.words)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of all models."""
        from trainables.synthetic import tokenizer_of

        return tokenizer_of(self.words)

    def model_config(self, family: str) -> ModelConfig:
        """Of the published size, or a tiny one."""
        from trainables.config import ModelConfig

        own = {"family": family, "tiny": TINY} if self.tiny else PUBLISHED[family]
        return ModelConfig.model_validate(own)

    def model(self, family: str) -> RetrievalModel:
        """With random weights."""
        from study.costs.shapes import architecture_of
        from trainables.synthetic import random_model

        config = self.model_config(family)
        torch.manual_seed(0)
        towers = architecture_of(config)
        return random_model(*towers, self.size.pixels[family], config.max_tokens, self.tokenizer, self.device)

    def pixels(self, family: str, images: int) -> np.ndarray:
        """uint8 (images, 3, side, side); every 64 images come again."""
        import numpy as np

        side = self.size.pixels[family]
        block = np.random.default_rng(0).integers(0, 256, (min(64, images), 3, side, side), dtype=np.uint8)
        return np.resize(block, (images, 3, side, side))

    def prepared(self, family: str, images: int, gallery: int) -> Prepared:
        """A new model with so many images, and how many of them are evaluated."""
        from trainables.synthetic import synthetic

        return synthetic(self.model(family), self.pixels(family, images), gallery, self.words)

    def trial(self, family: str, training: TrainingConfig, protocol: Protocol, recipe: Any = "mat") -> TrialConfig:
        """A recipe on the made-up data."""
        from search_spaces.recipes import recipe_point
        from trainables.config import DataConfig, TrialConfig

        return TrialConfig(
            point=recipe_point(recipe, EPSILON, 0.05),
            data=DataConfig(image_pixels=self.size.pixels[family]),
            model=self.model_config(family),
            training=training,
            protocol=protocol,
        )

    def shape(self, family: str) -> Shape:
        """What a plan would count with."""
        from study.config import StudyConfig, TrialTemplate
        from study.costs.shapes import shape_of
        from trainables.config import DataConfig

        data = DataConfig(image_pixels=self.size.pixels[family])
        return shape_of(StudyConfig(data=data, trial=TrialTemplate(model=self.model_config(family))))

    def largest(self, wanted: int, run: Callable[[int], Any]) -> tuple[int, Any]:
        """The largest of `wanted`, a half of it, a quarter, ... that fits the memory, and what `run` gave for it.

        Raises:
            torch.OutOfMemoryError: not even one fits.
        """
        size = wanted
        while True:
            try:
                return size, run(size)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            size //= 2
            self.tidy()

    def tidy(self) -> None:
        """Free what is not used any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.compiler.reset()  # or the next size would be compiled for any size


Part = Callable[[Bench], Iterator[Row]]
"""Yields rows as they are measured, so that a part that runs out of time or memory has shown what it could."""
