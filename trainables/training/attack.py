"""The training attack: the captions first, then the images against the attacked captions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.encoding import encode_captions
from trainables.attacks.image import pgd
from trainables.attacks.search import search_words
from trainables.attacks.text import attack_words, away_from
from trainables.config import TrialConfig
from trainables.models import RetrievalModel
from trainables.precision import inner_products
from trainables.training.chunks import by_chunks
from trainables.training.compiled import Tower, through_tower
from trainables.training.exchange import gather_with_gradient
from trainables.training.losses import embedding_deviation
from trainables.training.texts import Texts

ATTACK_TEMPERATURE = 0.05
"""Of the training attack's cross-entropy: fixed, so that the searched temperature cannot weaken the attack."""

REVISITS = 2
"""Words that a caption's attack may pass over, because no substitute helps there, before it gives up. Of 2,000 captions
of COCO, that changes less than one in a hundred (`tests/trainables/attacks/test_word_attack.py`)."""


def attack_pairs(
    model: RetrievalModel,
    config: TrialConfig,
    pixels: Tensor,
    texts: Texts,
    positives: Tensor,
    *,
    epsilon: float,
    keys: Tensor,
    original: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """This worker's adversarial pairs.

    Args:
        model: in eval mode, parameters without gradient.
        config: of the trial.
        pixels: (batch, 3, height, width) in [0, 1], this worker's clean images.
        texts: this worker's captions, on the device; in the batch, those of an image stand in turn.
        positives: bool (batch, captions of all workers), which describe this worker's images.
        epsilon: radius at this step.
        keys: int64 (batch,), the source of each image's randomness.
        original: (batch, dim), the frozen original's embeddings of the clean images, for the objective `deviation`.

    Returns:
        Attacked pixels, and the attacked captions' words (captions, places).
    """
    point, captions, at_once = config.point, texts.candidates, config.training.micro_batch or len(pixels)
    encode = partial(encode_captions, model, max_tokens=config.model.max_tokens, device=pixels.device)
    words, features = captions.words, None
    if point.words:
        with torch.no_grad():
            (clean,) = by_chunks(lambda part: (F.normalize(model.encode_image(part).float(), dim=-1),), at_once, pixels)
        away = away_from(clean[texts.order // point.captions_per_image])
        if point.text_search == "exact":
            attacked, features = search_words(encode, captions, away, words=point.words, converge=False)
        else:
            attacked, features = attack_words(encode, captions, away, words=point.words, visits=point.words + REVISITS)
        words = attacked.rows
    words = words[texts.back]
    if epsilon == 0:
        return pixels, words
    if point.attack_objective == "deviation":
        assert original is not None
        held_against = original

        def objective(features: Tensor, rows: slice) -> Tensor:
            return embedding_deviation(features, held_against[rows])
    else:
        # In crossed pairs an attacked image stands beside clean captions, so that is what it is attacked against.
        if features is None or point.pairs == "crossed":
            features = encode(captions.captions)
        against = gather_with_gradient(features[texts.back])
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

    return through_tower(model, config.training, perturbed), words
