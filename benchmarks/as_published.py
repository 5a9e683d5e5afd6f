"""The published attacks on what ours attack: the same models, pairs, random numbers and quirks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.published import attacks as peers
from benchmarks.published.attacks import Attacked, Pairs, Victim
from benchmarks.published.images import Draws
from benchmarks.published.words import Reading
from trainables.attacks.cmi import CmiAttack
from trainables.attacks.co_attack import CoAttack
from trainables.attacks.noise import normal, step_keys, uniform
from trainables.attacks.quirks import Quirks
from trainables.attacks.sep import SepAttack
from trainables.attacks.sga import STEP_SHARE, Dra, Sga, mixture_table
from trainables.models import RetrievalModel


def victim_of(model: RetrievalModel, max_tokens: int) -> Victim:
    """The model; captions are padded to the most tokens that it may read, as in the published code."""

    def encode_texts(captions: Sequence[str], tokens: int) -> Tensor:
        length = min(tokens, max_tokens)
        batch = model.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(next(model.parameters()).device)
        return F.normalize(model.encode_text(batch["input_ids"], batch["attention_mask"]), dim=-1)

    return Victim(lambda pixels: F.normalize(model.encode_image(pixels), dim=-1), encode_texts, max_tokens)


def reading_of(
    masked_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quirks: Quirks,
    candidates: int = 10,
    max_length: int = 64,
) -> Reading:
    """How words are chosen and replaced under some quirks; ours never puts two words for one."""
    return Reading(
        masked_lm,
        tokenizer,
        max_length,
        row_before="cls_offset" in quirks,
        end_token="no_end_token" not in quirks,
        top_k=candidates,
        threshold=0.3 if "logit_cut" in quirks else None,
        combinations="subword_product" in quirks,
        refill="no_refill" not in quirks,
        letters_only="symbols" not in quirks,
        one_word=True,
        unknown="unk_importance" in quirks,
    )


def draws_of(keys: Tensor, shape: tuple[int, ...], steps: int) -> Draws:
    """Our random numbers: of images with such keys and shape, in an attack of so many steps.

    Triples are the first image's, and never need to be drawn again.
    """
    reached, weights = mixture_table()

    def noise(step: int, copy: int) -> Tensor:
        return normal(step_keys(step_keys(keys, 16 * (step or steps + 1)), copy + 1), shape)

    def triple(step: int, trial: int) -> tuple[int, int]:
        draw = uniform(step_keys(keys[:1], 1000 + step - 1), (trial + 1,))[0, trial].double().cpu()
        first, second, _ = (100 * weights[torch.searchsorted(reached, draw, right=True)]).round().tolist()
        return int(first), int(second)

    return Draws(lambda start: 2 * uniform(step_keys(keys, start), shape) - 1, noise, triple)


Peer = Sga | CmiAttack | CoAttack | SepAttack


def as_published(attack: Peer, victim: Victim, reading: Reading, pairs: Pairs, draws: Draws) -> Attacked:
    """What the published code makes of these pairs at our attack's budget, with those of its quirks that are on."""
    quirks, words, steps = attack.quirks, attack.words, attack.steps
    if isinstance(attack, CoAttack):
        sides = {"one_sided": "one_sided_start" in quirks, "last_caption": "last_caption" in quirks}
        return peers.co_attack(victim, reading, pairs, draws, attack.epsilon, steps, words, **sides)
    if isinstance(attack, SepAttack):  # whose code was never released; ours takes longer steps than Co-Attack's
        step_size = 2.5 * attack.epsilon / steps
        return peers.sep_attack(victim, reading, pairs, draws, attack.epsilon, step_size, steps, words)
    budget = (attack.epsilon, STEP_SHARE * attack.epsilon, steps)
    if isinstance(attack, CmiAttack):
        return peers.cmi(victim, reading, pairs, draws, *budget, attack.momentum, words)
    tokens = peers.SUPERVISION_TOKENS if "supervision_30_tokens" in quirks else victim.max_length
    if isinstance(attack, Dra):
        return peers.dra(victim, reading, pairs, draws, *budget, words, tokens, "free_look_ahead" in quirks)
    return peers.sga(victim, reading, pairs, draws, *budget, words, tokens)
