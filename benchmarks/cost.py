"""What attacking COCO's whole Karpathy test split costs: measured for captions, on this machine; counted for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from benchmarks.setup import MAX_TOKENS, Models, timed
from trainables.attacks.candidates import Candidates, numbered
from trainables.attacks.encoding import CaptionEncoder
from trainables.attacks.lexicon import lexicon_of
from trainables.attacks.text import attack_words, away_from
from trainables.config import TinyConfig
from trainables.models.clip import Clip

IMAGES = 5000
"""Of the split, with 25,010 captions."""

PEAK, UTILISATION = 312e12, 0.4
"""Of an A100: operations a second in dense bfloat16 (data sheet), and the share that is assumed to be reached."""

APGD_STEPS = 100
"""As AutoAttack's APGD (Croce and Hein 2020)."""

STEPS, COPIES = 10, 5
"""Of SGA, Co-Attack and CMI-Attack, and the scaled copies of SGA and CMI-Attack, the image itself among them."""


def tower_flops(layers: int, width: int, tokens: float) -> float:
    """Of one forward pass: 24 width^2 + 4 tokens width a token and layer; multiplication and addition are two."""
    return layers * tokens * (24 * width**2 + 4 * tokens * width)


def karpathy(captions: list[str], limit: int) -> str:
    """The report.

    Args:
        captions: of the split.
        limit: how many of them are attacked here; times of more are extrapolated.
    """
    models = Models.make(captions, TinyConfig())
    text, vision = CLIPTextConfig(), CLIPVisionConfig(patch_size=16)  # ViT-B/16
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    tokenizer = models.tokenizer
    config.text_config.eos_token_id = tokenizer.eos_token_id
    clip = Clip(CLIPModel(config), tokenizer).eval().requires_grad_(False)
    measured = captions[:: max(1, len(captions) // limit)][:limit]
    table_seconds, table = timed(lambda: models.table(measured, frozenset()))
    features = F.normalize(torch.randn(len(measured), config.projection_dim), dim=-1)
    encoder, seen = CaptionEncoder(clip, MAX_TOKENS, features.device), set[str]()

    def encode(texts: Sequence[str]) -> Tensor:
        seen.update(texts)
        return encoder(texts)

    lexicon = lexicon_of(tokenizer)
    candidates = Candidates.of(lexicon, *numbered(table, np.arange(len(measured)), lexicon))
    seconds, _ = timed(lambda: attack_words(encode, candidates, away_from(features), words=1))
    tokens = sum(map(len, lexicon.word_tokens(list(seen), MAX_TOKENS)))
    tries, length = len(seen) / len(measured), tokens / len(seen)
    whole = seconds / len(measured) * len(captions)
    lines = [
        f"Text attack on the Karpathy test split, random CLIP text tower {text.num_hidden_layers} x {text.hidden_size}",
        f"  measured: {len(measured)} captions in {seconds:.1f} s of one thread, "
        f"{tries:.1f} encodings of {length:.1f} tokens a caption, {tokens / seconds:,.0f} tokens/s",
        f"  {'measured' if len(measured) == len(captions) else 'EXTRAPOLATED'}: "
        f"{len(captions):,} captions in {whole / 60:.0f} min",
        f"  substitutes, once a corpus: {table_seconds:.2f} s for {len(measured)} captions with a tiny language model",
        "",
        *projection(len(captions), tries, length, text, vision),
    ]
    return "\n".join(lines)


def projection(captions: int, tries: float, length: float, text: CLIPTextConfig, vision: CLIPVisionConfig) -> list[str]:
    """One evaluation under SGA, Co-Attack, CMI-Attack and APGD, counted; nothing of it was measured on a GPU."""
    image_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    image_flops = tower_flops(vision.num_hidden_layers, vision.hidden_size, image_tokens)
    text_flops = tower_flops(text.num_hidden_layers, text.hidden_size, length)
    # A gradient for the pixels alone costs one more forward pass: no gradients of weights. A last pass scores.
    passes = {
        "clean": 1,
        "SGA": STEPS * COPIES * 2 + 2,
        "Co-Attack": STEPS * 2 + 1,
        "CMI-Attack": 1 + (STEPS + 1) * COPIES * 2 + 1,
        "APGD": APGD_STEPS * 2 + 1,
    }
    lines = [
        f"PROJECTED: one evaluation of CLIP ViT-B/16 at {vision.image_size} pixels on {IMAGES:,} images and "
        f"{captions:,} captions, on one A100",
        f"  a forward pass: {image_flops / 1e9:.1f} GFLOP an image ({image_tokens} tokens), "
        f"{text_flops / 1e9:.2f} GFLOP a caption ({length:.1f} tokens)",
        f"  assumed: {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s in bfloat16",
    ]
    total = 0.0
    for name, count in passes.items():
        flops = IMAGES * count * image_flops
        total += flops
        lines.append(f"  {name:11}{IMAGES:,} images x {count:3} passes = {flops / 1e15:5.1f} PFLOP")
    # Importance and substitutes do not depend on the image: SGA's two text steps and CMI-Attack's share encodings.
    words = captions * tries * text_flops
    total += words
    lines.append(f"  {'captions':11}{captions:,} captions x {tries:.1f} encodings = {words / 1e15:5.1f} PFLOP")
    seconds = total / (PEAK * UTILISATION)
    lines.append(f"  sum {total / 1e15:.0f} PFLOP / {PEAK * UTILISATION / 1e12:.0f} TFLOP/s = {seconds / 60:.0f} min")
    return lines
