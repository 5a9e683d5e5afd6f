"""What an attack on captions may write where: a batch's words and their substitutes as numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainables.attacks.lexicon import NONE, Captions, Lexicon
from trainables.attacks.substitutes import SUBSTITUTES, Substitutes


def numbered(
    substitutes: Substitutes, captions: np.ndarray, lexicon: Lexicon, candidates: int = SUBSTITUTES
) -> tuple[np.ndarray, np.ndarray]:
    """Words (captions, places) and what may replace them (captions, places, candidates), int64 numbers, or `NONE`.

    Args:
        substitutes: of a corpus.
        captions: int64 (captions,), rows of it.
        lexicon: whose numbers they become.
        candidates: of each word's best predictions; what lies behind `SUBSTITUTES` of them is kept, too.
    """
    number, starts = lexicon.numbers(substitutes.vocabulary), substitutes.starts[captions]
    counts = substitutes.starts[captions + 1] - starts
    place = np.arange(counts.max(initial=1))
    inside = place < counts[:, None]
    found = (starts[:, None] + place)[inside]
    kept = np.r_[:candidates, SUBSTITUTES : substitutes.options.shape[1]]
    words, options = np.full(inside.shape, NONE), np.full((*inside.shape, len(kept)), NONE)
    words[inside] = number[substitutes.words[found]]
    options[inside] = number[substitutes.options[found][:, kept]]
    return words, options


@dataclass(frozen=True, eq=False)
class Candidates:
    """Captions of a batch and what may replace their words.

    Attributes:
        lexicon: whose numbers the words are.
        words: int64 (captions, places), `NONE` behind the last word.
        options: int64 (captions, places, candidates), best first, `NONE` where there is none.
        owner: int64 (attackable words,), rising: the captions of the words that have candidates.
        place: int64 (attackable words,): where in them these words stand.
        lengths: (captions,) tokens at most before anything is changed; on the host, as the following.
        growth: (captions,) tokens at most that one substitution adds.
        attackable: (captions,) words that have candidates.
    """

    lexicon: Lexicon
    words: Tensor
    options: Tensor
    owner: Tensor
    place: Tensor
    lengths: np.ndarray
    growth: np.ndarray
    attackable: np.ndarray

    @classmethod
    def of(cls, lexicon: Lexicon, words: np.ndarray, options: np.ndarray) -> Candidates:
        """On the host; see `numbered`."""
        tokens, written = lexicon.lengths, lexicon.lengths[words]
        if lexicon.word_tokens.by_words:
            lengths = lexicon.special + written.sum(1)
            growth = (tokens[options].max(2, initial=0) - written).max(1, initial=0)
        else:
            lengths, growth = np.full(len(words), np.iinfo(np.int32).max), np.zeros(len(words), dtype=np.int64)
        attackable = (options != NONE).any(2)
        owner, place = map(torch.from_numpy, attackable.nonzero())
        return cls(
            lexicon,
            torch.from_numpy(words),
            torch.from_numpy(options),
            owner,
            place,
            lengths,
            growth,
            attackable.sum(1),
        )

    def moved(self, move: Callable[[Tensor], Tensor]) -> Candidates:
        """With other tensors of the same values."""
        words, options, owner, place = map(move, (self.words, self.options, self.owner, self.place))
        return replace(self, words=words, options=options, owner=owner, place=place)

    def first(self, places: int) -> Candidates:
        """What an attack sees that reads so many words of a caption; none behind them has candidates."""
        return replace(self, words=self.words[:, :places], options=self.options[:, :places])

    def longest(self, changes: int) -> np.ndarray:
        """(captions,) tokens at most after so many substitutions, on the host."""
        return self.lengths + changes * self.growth

    @property
    def captions(self) -> Captions:
        """Before anything is changed."""
        return Captions(self.words, self.lexicon, self.lengths)
