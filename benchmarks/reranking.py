"""ITM re-ranking against the published evaluation loop of ALBEF and BLIP, at equal scores.

`python -m benchmarks.reranking` takes about a minute. Width, heads and image tokens are those of ViT-B/16 at 384
pixels; the text side has fewer layers, since every layer costs the same. Seconds are the CPU's, on one thread.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Row
from trainables.config import TinyConfig
from trainables.evaluation.reranking import candidate_scores
from trainables.models import tokenize
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.training.pretraining import train_tokenizer

LENGTH = {Albef: 30, Blip: 35}
"""Tokens that the published code pads every caption to."""


def published_scores(
    model: Albef | Blip,
    image_tokens: Tensor,
    image_features: Tensor,
    captions: list[str],
    text_features: Tensor,
    of_images: Tensor,
    of_captions: Tensor,
) -> tuple[Tensor, Tensor]:
    """As published: one query at a time, images gathered and copied for each caption, everything padded.

    Args:
        model: with random weights.
        image_tokens: (images, image tokens, width).
        image_features: (images, dim).
        captions: (captions,) texts.
        text_features: (captions, dim).
        of_images: (images, candidates), captions.
        of_captions: (captions, candidates), images.

    Returns:
        Scores, like `of_images` and like `of_captions`.
    """
    batch = model.tokenizer(
        captions, padding="max_length", truncation=True, max_length=LENGTH[type(model)], return_tensors="pt"
    )
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    similarity = image_features @ text_features.T
    text_tokens = model.text_tokens(tokens, mask)

    def match(images: Tensor, texts: Tensor) -> Tensor:
        unseen = (1.0 - mask[texts].float()[:, None, None]) * torch.finfo(torch.float32).min
        seen, states = image_tokens[images], text_tokens[texts]
        for layer in model.fusion_layers():
            states = layer(states, encoder_hidden_states=seen, attention_mask=unseen)
        logits: Tensor = model.network.itm_head(states[:, 0])[:, 1]
        return logits + model.similarity_weight * similarity[images, texts]

    to_text = [match(torch.full_like(texts, image), texts) for image, texts in enumerate(of_images)]
    to_image = [match(images, torch.full_like(images, text)) for text, images in enumerate(of_captions)]
    return torch.stack(to_text), torch.stack(to_image)


def gallery(images: int) -> tuple[list[str], np.ndarray]:
    """Captions of 8 to 14 words, five for each image, and their images."""
    rng = np.random.default_rng(0)
    words = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]
    captions = [" ".join(rng.choice(words, rng.integers(8, 15))) for _ in range(5 * images)]
    return captions, np.repeat(np.arange(images), 5)


@torch.no_grad()
def compare(family: type[Albef | Blip], size: TinyConfig, image_pixels: int, images: int, candidates: int) -> Row:
    """Both ways on one random model.

    Args:
        family: of the model.
        size: its layers are those of a tower.
        image_pixels: of a side.
        images: of the gallery, each with five captions.
        candidates: of each query.
    """
    torch.manual_seed(0)
    captions, caption_image = gallery(images)
    model = family.tiny(size, image_pixels, 64, train_tokenizer(captions)).eval()
    image_tokens = torch.cat([model.image_tokens(torch.rand(1, 3, image_pixels, image_pixels)) for _ in range(images)])
    _, mask = tokenize(model, captions, LENGTH[family])
    # Random features: those of a random model would be all alike, and candidates should differ.
    image_features = F.normalize(torch.randn(images, 64), dim=-1)
    text_features = F.normalize(torch.randn(len(captions), 64) + image_features[caption_image], dim=-1)

    similarity = image_features @ text_features.T
    inputs = (image_features, captions, text_features, similarity.topk(candidates).indices)
    start = time.process_time()
    reference = published_scores(model, image_tokens, *inputs, similarity.T.topk(candidates).indices)
    reference_seconds = time.process_time() - start
    start = time.process_time()
    ours = candidate_scores(
        model, [image_tokens], *inputs, similarity.T.topk(candidates).indices, max_tokens=LENGTH[family]
    )
    seconds = time.process_time() - start
    equal = all(torch.allclose(a, b, atol=1e-4, rtol=0) for a, b in zip(reference, ours, strict=True))
    return Row(
        f"reranking/{family.__name__.lower()}",
        reference_seconds,
        seconds,
        equal,
        f"{images} images x 5 captions of {mask.sum(1).float().mean():.0f} tokens, {candidates} candidates, "
        f"{len(list(model.fusion_layers()))} layers of width {size.width}, {image_tokens.shape[1]} image tokens",
    )


def measure() -> list[Row]:
    """ALBEF and BLIP."""
    torch.set_num_threads(1)
    return [
        compare(family, TinyConfig(width=768, layers=layers, heads=12, patch_pixels=16, embedding=64), 384, 8, 6)
        for family, layers in ((Albef, 6), (Blip, 3))
    ]


if __name__ == "__main__":
    for row in measure():
        print(f"{row.name}: {row.reference_seconds / row.seconds:.1f}x, equal {row.equal} ({row.note})")
