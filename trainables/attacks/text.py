"""The attack on words: some replaced by what a masked language model proposes (BERT-Attack), many captions at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.candidates import Candidates
from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.encoding import READ_FREELY, Encode
from trainables.attacks.lexicon import GONE, NONE, Captions
from trainables.attacks.quirks import FIRST_WORDS, TEXT_QUIRKS, Quirks

UNKNOWN = np.array(["[UNK]"])
"""Stands for the word whose importance is asked, in Co-Attack's published code."""

Misfit = Callable[[Tensor, Tensor], Tensor]
"""(features (tries, dim), which caption each is a version of (tries,)) -> (tries,); the attack raises it."""

Importance = Literal["deletion", "unknown"]


def away_from(image_features: Tensor) -> Misfit:
    """Lower the cosine to each caption's image, (captions, dim) L2-normalised: SGA's objective (Lu et al. 2023)."""
    return lambda features, rows: -(features * image_features[rows]).sum(1)


def embedding_divergence(clean: Tensor, features: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(features)) of L2-normalised embeddings, (rows,): Co-Attack's distance.

    Unit vectors have nearly uniform softmaxes, so the values are of the order 1e-5, where float32 is too coarse.
    """
    logs = F.log_softmax(clean.double(), -1)
    return (logs.exp() * (logs - F.log_softmax(features.double(), -1))).sum(-1)


def divergence_from(clean: Tensor) -> Misfit:
    """Raise the divergence from each caption's clean embedding, (captions, dim) L2-normalised, as Co-Attack does."""
    return lambda features, rows: embedding_divergence(clean[rows], features)


def score_candidates(
    encode: Encode,
    captions: Candidates,
    misfit: Misfit,
    words: Tensor,
    owner: Tensor,
    place: Tensor,
    longest: np.ndarray | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The misfit of every candidate at some places, in one call.

    Args:
        encode: captions to features.
        captions: whose candidates are put in.
        misfit: see `Misfit`.
        words: int64 (places, words), the caption that each place is in, as it stands.
        owner: int64 (places,), which caption that is.
        place: int64 (places,), where in it.
        longest: (places x candidates,) tokens at most. Then nothing is read from the device, and what is no candidate
            is encoded with the others.

    Returns:
        float32 (places, candidates), minus infinity where there is none or its misfit is NaN; the features (tries, dim)
        of what was tried; and int64 (places, candidates), each candidate's row of them.
    """
    options = captions.options[owner, place]
    there = options != NONE
    if longest is None:
        row, column = there.nonzero().unbind(1)
    else:
        row = torch.arange(len(options), device=options.device).repeat_interleave(options.shape[1])
        column = torch.arange(options.shape[1], device=options.device).repeat(len(options))
    tried = words[row].scatter(1, place[row, None], options[row, column, None])
    features = encode(Captions(tried, captions.lexicon, longest))
    values = misfit(features, owner[row])
    scores = values.new_full(options.shape, -torch.inf)
    scores[row, column] = values
    tries = torch.zeros_like(options)
    tries[row, column] = torch.arange(len(row), device=row.device)
    return scores.masked_fill(~there | scores.isnan(), -torch.inf), features, tries


def score_words(encode: Encode, captions: Candidates, misfit: Misfit) -> Tensor:
    """The misfit of every candidate of every word of unchanged captions, float32 (captions, places, candidates).

    Minus infinity where there is none. An exhaustive search for one word is an argmax over the last two.
    """
    scores = torch.full(captions.options.shape, -torch.inf, device=captions.words.device)
    owner, place = captions.owner, captions.place
    if len(owner):
        scores[owner, place] = score_candidates(encode, captions, misfit, captions.words[owner], owner, place)[0]
    return scores


def attack_words(
    encode: Encode,
    captions: Candidates,
    misfit: Misfit,
    *,
    words: int,
    importance: Importance = "deletion",
    visits: int | None = None,
) -> tuple[Captions, Tensor]:
    """Change at most `words` words of each caption so that its misfit rises (Li et al. 2020).

    Words are visited in falling importance, in a caption's own order where that is equal; the first substitute with the
    highest misfit is taken if that is more than before. All captions advance together, so the encoder sees large
    batches. Deterministic, and each caption's result depends on nothing but itself.

    Args:
        encode: captions to features.
        captions: with their candidates; words without any are neither masked nor changed.
        misfit: what the attack raises.
        words: largest number of changed words.
        importance: how far the embedding moves, in squared L2, when the word is left out (Jin et al. 2020), or, in
            Co-Attack's KL, when it is replaced by the literal `[UNK]` as in the published code.
        visits: words of a caption that are visited at most; all if not given. With a number, nothing is read from the
            device unless it is one of `READ_FREELY`: every caption is visited so often, whether it is done or not.

    Returns:
        The attacked captions, and their features.
    """
    lexicon, rows, count = captions.lexicon, captions.words.clone(), len(captions.words)
    longest = None if visits is None or rows.device.type in READ_FREELY else captions.longest(words)
    features = encode(captions.captions)
    owner, place = captions.owner, captions.place
    if words == 0 or len(owner) == 0:
        return Captions(rows, lexicon, longest), features
    blank = GONE if importance == "deletion" else int(lexicon.numbers(UNKNOWN)[0])
    without = rows[owner].scatter(1, place[:, None], blank)
    masked = encode(Captions(without, lexicon, captions.lengths.repeat(captions.attackable)))
    if importance == "deletion":
        moved = (masked - features[owner]).square().sum(1)
    else:
        moved = embedding_divergence(features[owner], masked)
    weights = moved.new_full(rows.shape, -torch.inf)
    weights[owner, place] = moved
    order = weights.argsort(dim=1, descending=True, stable=True)
    queued = (captions.options != NONE).any(2).sum(1)

    everyone = torch.arange(count, device=rows.device)
    reached, left = misfit(features, everyone), torch.full_like(everyone, words)
    for visit in range(rows.shape[1] if visits is None else min(visits, rows.shape[1])):
        active = (left > 0) & (visit < queued)
        if longest is None:
            chosen, bounds = active.nonzero()[:, 0], None
            if len(chosen) == 0:
                break
        else:
            chosen, bounds = everyone, longest.repeat(captions.options.shape[2])
        now, at = rows[chosen], order[chosen, visit]
        scores, tried, tries = score_candidates(encode, captions, misfit, now, chosen, at, bounds)
        best = scores.argmax(1, keepdim=True)  # the first of the highest
        value = scores.gather(1, best)[:, 0]
        better = (value > reached[chosen]) & active[chosen]
        put = captions.options[chosen, at].gather(1, best)
        rows[chosen] = torch.where(better[:, None], now.scatter(1, at[:, None], put), now)
        features[chosen] = torch.where(better[:, None], tried[tries.gather(1, best)[:, 0]], features[chosen])
        reached[chosen] = torch.where(better, value, reached[chosen])
        left[chosen] -= better.long()
    return Captions(rows, lexicon, longest), features


@dataclass(frozen=True)
class BertAttack(Attack):
    """Words replaced by a masked language model's proposals (Li et al. 2020), as used on vision-language models.

    Attributes:
        candidates: proposals tried per word.
        objective: `cross` lowers the similarity to the caption's image, `deviation` raises the divergence from the
            clean caption's embedding (Co-Attack's text step).
        quirks: any of `TEXT_QUIRKS`.
    """

    changes = frozenset({"text"})
    known_quirks = TEXT_QUIRKS
    words: int = 1
    candidates: int = 10
    objective: Literal["cross", "deviation"] = "cross"
    quirks: Quirks = frozenset()

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """Against the clean images."""
        return Attacked(batch.pixels, self.captions(batch, batch.clean_features(victim)))

    def captions(self, batch: Batch, image_features: Tensor) -> Captions:
        """The attacked captions of the batch.

        Args:
            batch: its clean captions are attacked.
            image_features: (images, dim) L2-normalised, what `cross` leads away from.
        """
        whole = batch.candidates(self.quirks, self.candidates)
        seen = whole.first(FIRST_WORDS) if "first_30_words" in self.quirks else whole
        if self.objective == "cross":
            misfit = away_from(image_features[batch.owner])
        else:
            misfit = divergence_from(batch.encode(seen.captions))
        attacked, _ = attack_words(
            batch.encode,
            seen,
            misfit,
            words=self.words,
            importance="unknown" if "unk_importance" in self.quirks else "deletion",
        )
        unseen = whole.words[:, attacked.rows.shape[1] :]
        return Captions(torch.cat([attacked.rows, unseen], 1), attacked.lexicon)
