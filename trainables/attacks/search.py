"""The exact attack on words: every word with every candidate, by the retrieval loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainables.attacks.candidates import Candidates
from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.encoding import READ_FREELY, Encode
from trainables.attacks.lexicon import Captions
from trainables.attacks.rivals import Loss, Rivals
from trainables.attacks.text import Misfit, score_candidates


def search_words(
    encode: Encode, captions: Candidates, misfit: Misfit, *, words: int, converge: bool = True
) -> tuple[Captions, Tensor]:
    """The change of at most `words` words of each caption that raises its misfit most.

    For one word it is exact. For more, the best single change is made so often; then changed words are taken back one
    at a time for the best change instead, until none is better. All captions advance together. Deterministic, and each
    caption's result depends on nothing but itself.

    Args:
        encode: captions to features.
        captions: with their candidates.
        misfit: what the attack raises.
        words: largest number of changed words.
        converge: whether changes are exchanged. If not, nothing is read from the device unless it is one of
            `READ_FREELY`.

    Returns:
        The attacked captions, and their features.
    """
    lexicon, rows = captions.lexicon, captions.words.clone()
    longest = None if converge or rows.device.type in READ_FREELY else captions.longest(words)
    features = encode(captions.captions)
    if words == 0 or len(captions.owner) == 0:
        return Captions(rows, lexicon, longest), features
    everyone = torch.arange(len(rows), device=rows.device)
    reached = misfit(features, everyone)

    def best(bases: Tensor, of: Tensor, owner: Tensor, place: Tensor, bounds: np.ndarray | None) -> Tensor:
        """Make the best change of some versions of captions; bool (captions,), which it made better.

        `bases` are (versions, places) words, `of` whose; `owner` and `place` the version and place of every change.
        """
        nonlocal rows, features, reached
        whose = of[owner]
        scores, tried, tries = score_candidates(encode, captions, misfit, bases[owner], whose, place, bounds)
        value, candidate = scores.max(1)  # the first of the highest
        highest = torch.full_like(reached, -torch.inf).scatter_reduce(0, whose, value, "amax")
        number = torch.arange(len(value), device=rows.device)
        first = torch.full_like(everyone, len(value)).scatter_reduce(
            0, whose, torch.where(value == highest[whose], number, len(value)), "amin"
        )
        better = highest > reached
        move = torch.where(better, first, 0)
        option = candidate[move]
        changed = bases[owner[move]].scatter(
            1, place[move, None], captions.options[whose[move], place[move], option][:, None]
        )
        rows = torch.where(better[:, None], changed, rows)
        features = torch.where(better[:, None], tried[tries[move, option]], features)
        reached = torch.where(better, highest, reached)
        return better

    owner, place, bounds = captions.owner, captions.place, None
    if longest is not None:
        bounds = longest.repeat(captions.attackable).repeat(captions.options.shape[2])
    for _ in range(words):
        best(rows, everyone, owner, place, bounds)
    active = everyone if converge and words > 1 else everyone[:0]
    counts = owner.bincount(minlength=len(rows))
    while len(active):
        changed = rows != captions.words
        full = changed.sum(1) == words
        one, back = (changed[active] & full[active, None]).nonzero().unbind(1)
        taken_back = active[one]
        restored = rows[taken_back].scatter(1, back[:, None], captions.words[taken_back].gather(1, back[:, None]))
        free = active[~full[active]]
        of = torch.cat([taken_back, free])
        bases = torch.cat([restored, rows[free]])
        each = counts[of]
        version = torch.arange(len(of), device=rows.device).repeat_interleave(each)
        nth = torch.arange(len(version), device=rows.device) - (each.cumsum(0) - each)[version]
        at = place[(counts.cumsum(0) - counts)[of[version]] + nth]
        if len(version) == 0:
            break
        active = best(bases, of, version, at, None).nonzero()[:, 0]
    return Captions(rows, lexicon, longest), features


def best_changes(encode: Encode, captions: Candidates, misfit: Misfit, rows: Tensor, count: int) -> Iterator[Tensor]:
    """The changes of one word that raise the misfit most, best first: each int64 (captions, places), like `rows`.

    Args:
        encode: captions to features.
        captions: with their candidates.
        misfit: what is raised.
        rows: int64 (captions, places), the captions as they are. Words changed already stay.
        count: how many at most; a caption with fewer stays as it is in the others.
    """
    scores = torch.full(captions.options.shape, -torch.inf, device=rows.device)
    owner, place = captions.owner, captions.place
    if len(owner):
        scores[owner, place] = score_candidates(encode, captions, misfit, rows[owner], owner, place)[0]
    scores[rows != captions.words] = -torch.inf
    values, chosen = scores.flatten(1).topk(min(count, scores[0].numel()))
    for value, change in zip(values.T, chosen.T, strict=True):
        at = (change // scores.shape[2])[:, None]
        option = captions.options.flatten(1).gather(1, change[:, None])
        changed = rows.scatter(1, at, option)
        yield torch.where(value[:, None] > -torch.inf, changed, rows)


@dataclass(frozen=True)
class TextSearch(Attack):
    """The words whose change raises the retrieval loss most; of one word, and by that loss, no change is stronger.

    BERT-Attack and what follows it visit words in the order of their importance, and take the first that helps. With
    everything else alike, the search finds changes that hurt far more, at little more cost.

    Attributes:
        words: changed per caption.
        candidates: substitutes tried per word.
        loss: `cosine` lowers the similarity to the caption's image alone, which is what text retrieval goes by; the
            others count the gallery's wrong images, which image retrieval goes by, too.
    """

    changes = frozenset({"text"})
    words: int = 1
    candidates: int = 10
    loss: Loss = "cross"

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """Against the clean images."""
        return Attacked(batch.pixels, self.captions(victim, batch, batch.clean_features(victim)))

    def captions(self, victim: Victim, batch: Batch, image_features: Tensor) -> Captions:
        """The attacked captions of the batch.

        Args:
            victim: its gallery's images are what is retrieved instead.
            batch: its clean captions are attacked.
            image_features: (images, dim) L2-normalised, of its images as they are now.
        """
        misfit = Rivals(victim, batch, self.loss).misfit(image_features)
        found, _ = search_words(batch.encode, batch.candidates(count=self.candidates), misfit, words=self.words)
        return found
