"""One training step up to its loss: a batch's pairs are attacked and judged."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainables.attacks.encoding import READ_FREELY
from trainables.config import TrialConfig
from trainables.precision import attackable, autocast
from trainables.training.attack import attack_pairs
from trainables.training.batches import ramped_distillation, ramped_epsilon, random_crops
from trainables.training.clock import Clock
from trainables.training.feed import Batch
from trainables.training.objective import Pairs, Trainee
from trainables.training.original import Original
from trainables.training.sharding import gather


def worker_loss(
    ddp: nn.Module,
    trainee: Trainee,
    config: TrialConfig,
    original: Original | None,
    batch: Batch,
    step: int,
    steps: int,
    clock: Clock,
) -> Tensor:
    """The global batch's loss at `step`, with this worker's adversarial pairs made on the way."""
    point, seed, device = config.point, config.seed, batch.pixels.device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pixels = random_crops(batch.pixels, batch.keys) if point.image_augmentation == "crop" else batch.pixels
    clean_embeddings = None if original is None else original(batch.images, pixels)

    clock.mark("attack")
    gather(trainee)
    with attackable(trainee.model, device):
        attacked, words = attack_pairs(
            trainee.model,
            config,
            pixels,
            batch.texts,
            batch.positives[0],
            epsilon=ramped_epsilon(config, step, steps),
            keys=batch.keys,
            original=clean_embeddings,
        )

    clock.mark("train")
    trainee.train()
    torch.manual_seed((seed * 1_000_003 + step) * 1024 + rank)  # dropout belongs to the step, not to history
    # As long on all workers, where the loss gathers text tokens; alone on a processor, no longer than they are.
    longest = None if world == 1 and device.type in READ_FREELY else batch.texts.longest
    captions = batch.texts.candidates
    tokens = partial(captions.lexicon.tokens, max_tokens=config.model.max_tokens, longest=longest)
    pairs = Pairs(attacked, *tokens(words))
    clean = Pairs(pixels, *tokens(captions.words[batch.texts.back])) if trainee.needs_clean else None
    with autocast(device):
        return ddp(
            pairs,
            clean,
            clean_embeddings,
            batch.positives,
            batch.caption_keys,
            ramped_distillation(config, step, steps),
        )
