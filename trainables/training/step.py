"""One training step up to its loss: a batch's pairs are attacked and judged."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.config import TrialConfig
from trainables.models import tokenize
from trainables.precision import attackable, autocast
from trainables.prepare import Prepared
from trainables.training.attack import attack_pairs
from trainables.training.batches import eda, ramped_distillation, ramped_epsilon, random_crops
from trainables.training.clock import Clock
from trainables.training.feed import Batch
from trainables.training.objective import Pairs, Trainee
from trainables.training.original import Original
from trainables.training.sharding import gather


def worker_loss(
    ddp: nn.Module,
    trainee: Trainee,
    config: TrialConfig,
    prepared: Prepared,
    original: Original | None,
    batch: Batch,
    step: int,
    steps: int,
    clock: Clock,
) -> Tensor:
    """The global batch's loss at `step`, with this worker's adversarial pairs made on the way."""
    point, seed, device = config.point, config.seed, batch.pixels.device
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = batch.parts[rank]
    pixels = random_crops(batch.pixels, batch.keys) if point.image_augmentation == "crop" else batch.pixels
    clean_embeddings = None if original is None else original(batch.images, pixels)
    words = [prepared.train.words_of(row) for row in own.captions.flat]
    options = [prepared.train.options_of(row, config.training.attack_candidates) for row in own.captions.flat]
    if point.text_augmentation == "eda":
        augmented = [
            eda(caption, ways, np.random.default_rng([seed, own.epoch, row]))
            for caption, ways, row in zip(words, options, own.captions.flat, strict=True)
        ]
        words, options = [caption for caption, _ in augmented], [ways for _, ways in augmented]

    clock.mark("attack")
    gather(trainee)
    with attackable(trainee.model, device):
        attacked, texts = attack_pairs(
            trainee.model,
            config,
            pixels,
            words,
            options,
            batch.positives[0],
            epsilon=ramped_epsilon(config, step, steps),
            keys=batch.keys,
            original=clean_embeddings,
        )

    clock.mark("train")
    trainee.train()
    torch.manual_seed((seed * 1_000_003 + step) * 1024 + rank)  # dropout belongs to the step, not to history
    pairs = Pairs(attacked, *_tokens(trainee, texts, config.model.max_tokens, device))
    clean = None
    if trainee.needs_clean:
        plain = [" ".join(caption) for caption in words]
        clean = Pairs(pixels, *_tokens(trainee, plain, config.model.max_tokens, device))
    with autocast(device):
        return ddp(
            pairs,
            clean,
            clean_embeddings,
            batch.positives,
            batch.caption_keys,
            ramped_distillation(config, step, steps),
        )


def _tokens(trainee: Trainee, texts: list[str], max_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, as long on all workers where the loss gathers text tokens."""
    tokens, mask = tokenize(trainee.model, texts, max_tokens)
    if trainee.companion == "matching" and dist.is_initialized():
        longest = torch.tensor(tokens.shape[1], device=device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        missing = int(longest) - tokens.shape[1]
        tokens = F.pad(tokens, (0, missing), value=trainee.model.tokenizer.pad_token_id)
        mask = F.pad(mask, (0, missing))
    return tokens.to(device), mask.to(device)
