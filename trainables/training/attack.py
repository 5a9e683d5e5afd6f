"""The training attack: the captions first, then the images against the attacked captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.image import pgd
from trainables.attacks.text import CaptionEncoder, attack_words, away_from
from trainables.config import TrialConfig
from trainables.models import RetrievalModel
from trainables.precision import inner_products
from trainables.training.chunks import by_chunks
from trainables.training.compiled import Tower, through_tower
from trainables.training.exchange import gather_with_gradient
from trainables.training.losses import embedding_deviation

ATTACK_TEMPERATURE = 0.05
"""Of the training attack's cross-entropy: fixed, so that the searched temperature cannot weaken the attack."""


def attack_pairs(
    model: RetrievalModel,
    config: TrialConfig,
    pixels: Tensor,
    words: Sequence[Sequence[str]],
    options: Sequence[Sequence[Sequence[str]]],
    positives: Tensor,
    *,
    epsilon: float,
    keys: Tensor,
    original: Tensor | None,
) -> tuple[Tensor, list[str]]:
    """This worker's adversarial pairs.

    Args:
        model: in eval mode, parameters without gradient.
        config: of the trial.
        pixels: (batch, 3, height, width) in [0, 1], this worker's clean images.
        words: of this worker's captions, those of an image in turn.
        options: what may replace each word.
        positives: bool (batch, captions of all workers), which describe this worker's images.
        epsilon: radius at this step.
        keys: int64 (batch,), the source of each image's randomness.
        original: (batch, dim), the frozen original's embeddings of the clean images, for the objective `deviation`.

    Returns:
        Attacked pixels, and attacked captions.
    """
    point, device, at_once = config.point, pixels.device, config.training.micro_batch or len(pixels)
    encode = CaptionEncoder(model, config.model.max_tokens, device)
    clean_texts = [" ".join(caption) for caption in words]
    texts = clean_texts
    if point.words:
        with torch.no_grad():
            (clean,) = by_chunks(lambda part: (F.normalize(model.encode_image(part).float(), dim=-1),), at_once, pixels)
        texts = attack_words(
            encode,
            words,
            options,
            away_from(clean.repeat_interleave(point.captions_per_image, 0)),
            words=point.words,
        )
    if epsilon == 0:
        return pixels, texts
    if point.attack_objective == "deviation":
        assert original is not None
        held_against = original

        def objective(features: Tensor, rows: slice) -> Tensor:
            return embedding_deviation(features, held_against[rows])
    else:
        # In crossed pairs an attacked image stands beside clean captions, so that is what it is attacked against.
        with torch.no_grad():
            against = gather_with_gradient(encode(clean_texts if point.pairs == "crossed" else texts))
        targets = positives.float() / positives.sum(1, keepdim=True)

        def objective(features: Tensor, rows: slice) -> Tensor:
            scores = inner_products(F.normalize(features, dim=-1), against)
            return F.cross_entropy(scores / ATTACK_TEMPERATURE, targets[rows], reduction="none")

    chunks = [slice(begin, begin + at_once) for begin in range(0, len(pixels), at_once)]

    def perturbed(encode_image: Tower) -> Tensor:
        def chunk(rows: slice) -> Tensor:
            return pgd(
                pixels[rows],
                lambda adversarial: objective(encode_image(adversarial).float(), rows),
                epsilon=epsilon,
                steps=point.attack_steps,
                keys=keys[rows],
            )

        return torch.cat([chunk(rows) for rows in chunks])

    return through_tower(model, config.training, perturbed), texts
