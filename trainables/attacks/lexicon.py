"""Captions as rows of word numbers: every word is tokenised once, and a caption's tokens are found by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import overload

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainables.attacks.noise import sample_keys

NONE = -1
"""Behind a caption's last word, and where nothing may replace a word."""

GONE = 0
"""What a word becomes that is left out: no text and no tokens."""

FACTOR = 0x5851F42D4C957F2D
"""Of the polynomial that tells rows apart, odd (Knuth's MMIX generator)."""


class WordTokens:
    """Token ids of captions, put together from those of their words, each of which is tokenised once.

    The tokenizers of CLIP, BERT and their like split at spaces before anything else, so the ids of a caption are those
    of its words, one after another. For a tokenizer that does otherwise, captions are tokenised as a whole.

    Attributes:
        by_words: whether it splits at spaces.
        before: special tokens in front of a caption.
        after: behind it.
    """

    PROBE = "a dog's half-asleep dog 2"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, Sequence[int]] = {}
        whole = tokenizer(self.PROBE, return_special_tokens_mask=True)
        tokens, special = whole["input_ids"], whole["special_tokens_mask"]
        first, last = special.index(0), len(special) - special[::-1].index(0)
        self.before, self.after = tokens[:first], tokens[last:]
        self.by_words = self._joined([self.PROBE], len(tokens)) == [tuple(tokens)]

    def __call__(self, captions: Sequence[str], max_tokens: int) -> Sequence[Sequence[int]]:
        """With special tokens, cut to `max_tokens`."""
        if self.by_words:
            return self._joined(captions, max_tokens)
        return self._tokenizer(list(captions), truncation=True, max_length=max_tokens)["input_ids"]

    def of_words(self, words: Sequence[str]) -> list[Sequence[int]]:
        """Of each word by itself, without special tokens."""
        new = [word for word in dict.fromkeys(words) if word not in self._ids]
        if new:
            self._ids.update(zip(new, self._tokenizer(new, add_special_tokens=False)["input_ids"], strict=True))
        return [self._ids[word] for word in words]

    def _joined(self, captions: Sequence[str], max_tokens: int) -> Sequence[Sequence[int]]:
        words = [caption.split() for caption in captions]
        self.of_words(list(chain.from_iterable(words)))
        room = max_tokens - len(self.before) - len(self.after)
        inside = (tuple(chain.from_iterable(map(self._ids.__getitem__, own)))[:room] for own in words)
        return [(*self.before, *ids, *self.after) for ids in inside]  # tuples weigh less on the garbage collector


class Lexicon:
    """Words by number, and their token ids. It grows by vocabularies, not by what attacks write.

    The tokens of rows of words are found by index arithmetic, on the device where the rows are. That needs a tokenizer
    that goes by words; for another, rows are spelled and tokenised as a whole on the host, which is slow.

    Args:
        tokenizer: of the model that reads the captions.

    Attributes:
        word_tokens: of strings.
        special: tokens of every caption that belong to no word.
        lengths: int64 (words + 1,) tokens of each; the last is 0, for `NONE`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.word_tokens = WordTokens(tokenizer)
        self.special = len(self.word_tokens.before) + len(self.word_tokens.after)
        self._padding = tokenizer.pad_token_id
        self._numbers: dict[str, int] = {}
        self._spelled: list[str] = []
        self._vocabularies: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self.lengths = np.zeros(1, dtype=np.int64)
        self.numbers(np.array([""]))  # `GONE`

    def numbers(self, vocabulary: np.ndarray) -> np.ndarray:
        """int64 (entries + 1,), each entry's number here; the last is `NONE`. Words that are new are added."""
        if id(vocabulary) not in self._vocabularies:
            words = vocabulary.tolist()
            new = [word for word in dict.fromkeys(words) if word not in self._numbers]
            if new:
                self._numbers.update((word, len(self._spelled) + place) for place, word in enumerate(new))
                self._spelled += new
                lengths = [len(ids) for ids in self.word_tokens.of_words(new)]
                self.lengths = np.concatenate([self.lengths[:-1], lengths, [0]])
                self._tables.clear()
            found = np.array([*(self._numbers[word] for word in words), NONE])
            self._vocabularies[id(vocabulary)] = vocabulary, found  # kept, so that no other array has this id
        return self._vocabularies[id(vocabulary)][1]

    def texts(self, rows: Tensor) -> list[str]:
        """The captions in letters, with single spaces between words."""
        return [" ".join(self._spelled[word] for word in row if word > GONE) for row in rows.tolist()]

    def counts(self, rows: Tensor, max_tokens: int) -> Tensor:
        """Tokens of each caption when its tokenizer goes by words, int64 (captions,)."""
        return (self._table(rows.device)[2][rows].sum(1) + self.special).clamp(max=max_tokens)

    def tokens(self, rows: Tensor, max_tokens: int, longest: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, each int64 (captions, longest).

        Args:
            rows: int64 (captions, places) word numbers.
            max_tokens: where captions are cut.
            longest: no caption has more tokens. Without it that is read from the device.
        """
        if not self.word_tokens.by_words:
            tokens, mask = padded(
                self.word_tokens(self.texts(rows), max_tokens), self._padding, longest and min(longest, max_tokens)
            )
            return tokens.to(rows.device), mask.to(rows.device)
        before, after = self.word_tokens.before, self.word_tokens.after
        counts = self.counts(rows, max_tokens)[:, None]
        longest = min(longest, max_tokens) if longest is not None else int(counts.max()) if len(rows) else 0
        ids, starts, lengths = self._table(rows.device)
        ends = lengths[rows].cumsum(1)
        place = torch.arange(longest, device=rows.device).expand(len(rows), -1)
        inside = place - len(before)
        word = torch.searchsorted(ends, inside.contiguous(), right=True).clamp_(max=rows.shape[1] - 1)
        first = starts[rows] - ends + lengths[rows]  # of a word's tokens, less their place in the caption
        tokens = ids[(first.gather(1, word) + inside).clamp_(0, len(ids) - 1)]
        tokens = tokens.masked_fill(place >= counts, self._padding)
        for position, token in enumerate(before):
            tokens[:, position] = token
        for position, token in enumerate(after):
            tokens = tokens.masked_fill(place == counts - len(after) + position, token)
        return tokens, (place < counts).long()

    def fingerprints(self, rows: Tensor) -> Tensor:
        """int64 (captions,), equal for equal rows; two others agree with a probability of about 2^-62."""
        codes = sample_keys(0, 0, rows) << 31 ^ sample_keys(1, 0, rows)
        powers = [pow(FACTOR, place, 2**64) for place in range(rows.shape[1])]
        weights = torch.from_numpy(np.array(powers, dtype=np.uint64).view(np.int64)).to(rows.device)
        return (codes.masked_fill(rows <= GONE, 0) * weights).sum(1)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids of all words one after another, and where each word's begin, and how many they are."""
        if device not in self._tables:
            ids = np.fromiter(chain.from_iterable(self.word_tokens.of_words(self._spelled)), dtype=np.int64)
            starts = np.concatenate([[0], self.lengths[:-1].cumsum()])
            parts = (np.append(ids, self._padding), starts, self.lengths)
            first, second, third = (torch.from_numpy(part).to(device) for part in parts)
            self._tables[device] = first, second, third
        return self._tables[device]


lexicon_of = lru_cache(maxsize=16)(Lexicon)
"""The lexicon of a tokenizer, one for all that reads captions with it."""


@dataclass(frozen=True, eq=False)
class Captions(Sequence[str]):
    """Captions as word numbers on a device; they become strings where someone looks at them.

    Attributes:
        rows: int64 (captions, places), `NONE` behind the last word.
        lexicon: whose numbers they are.
        longest: (captions,) tokens that each has at most, known without reading the rows, or None.
    """

    rows: Tensor
    lexicon: Lexicon
    longest: np.ndarray | None = None

    @cached_property
    def texts(self) -> list[str]:
        """In letters."""
        return self.lexicon.texts(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.texts[index]

    def take(self, places: Tensor | np.ndarray) -> Captions:
        """Those at int64 places, or where bools are true."""
        return Captions(self.rows[places], self.lexicon)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.texts == list(other)

    __hash__ = None  # type: ignore[assignment]  # not to be hashed, as a list: the stubs know only functions here


def padded(ids: Sequence[Sequence[int]], padding: int, longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each int64 (captions, longest), on the CPU.

    Args:
        ids: of each caption.
        padding: behind them.
        longest: of the captions at least; their own length if not given.
    """
    lengths = np.array([len(own) for own in ids], dtype=np.int64)
    mask = np.arange(lengths.max(initial=0) if longest is None else longest) < lengths[:, None]
    tokens = np.full(mask.shape, padding)
    tokens[mask] = np.fromiter(chain.from_iterable(ids), dtype=np.int64)
    return torch.from_numpy(tokens), torch.from_numpy(mask.astype(np.int64))
