"""What may replace each word of a caption. `proposals` makes it, once per corpus."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

SUBSTITUTES = 10
"""Predictions kept per word; attacks may use fewer."""

_STOP_WORDS = """
    a about above across after afterwards again against ain all almost alone along already also although am among
    amongst an and another any anyhow anyone anything anyway anywhere are aren aren't around as at back been before
    beforehand behind being below beside besides between beyond both but by can cannot could couldn couldn't d didn
    didn't doesn doesn't don don't down due during either else elsewhere empty enough even ever everyone everything
    everywhere except first for former formerly from hadn hadn't hasn hasn't haven haven't he hence her here
    hereafter hereby herein hereupon hers herself him himself his how however hundred i if in indeed into is isn
    isn't it it's its itself just latter latterly least ll may me meanwhile mightn mightn't mine more moreover most
    mostly must mustn mustn't my myself namely needn needn't neither never nevertheless next no nobody none noone
    nor not nothing now nowhere o of off on once one only onto or other others otherwise our ours ourselves out over
    per please s same shan shan't she she's should've shouldn shouldn't somehow something sometime somewhere such t
    than that that'll the their theirs them themselves then thence there thereafter thereby therefore therein
    thereupon these they this those through throughout thru thus to too toward towards under unless until up upon
    used ve was wasn wasn't we were weren weren't what whatever when whence whenever where whereafter whereas
    whereby wherein whereupon wherever whether which while whither who whoever whole whom whose why with within
    without won won't would wouldn wouldn't y yet you you'd you'll you're you've your yours yourself yourselves some
"""
_MARKS = (*'.-/?",b&!@%^*()+=<>|:;～·', "a the")
STOP_WORDS = frozenset(_STOP_WORDS.split()) | frozenset(_MARKS)
"""Never replaced, and never put in: the 292 entries of the attack literature's code.

They are TextFooler's 266 (Jin et al. 2020, as TextAttack keeps them), "some", and marks.
"""


@dataclass(frozen=True)
class Substitutes:
    """For each caption its words, and for each word what a masked language model would put there, best first.

    Words and what may replace them are as the caption's text has them (`captions`), punctuation included. Depends on
    captions, the family's text and the language model only, so all trials of a study share it.

    Attributes:
        vocabulary: (entries,) every word used.
        words: (words of all captions,) int32 entries.
        options: (words of all captions, `SUBSTITUTES` or more) int32 entries, -1 for none. Columns are ranks of the
            language model; those from `SUBSTITUTES` on hold the combinations of `subword_product`.
        starts: (captions + 1,) int64, where each caption's words begin.
    """

    vocabulary: np.ndarray
    words: np.ndarray
    options: np.ndarray
    starts: np.ndarray

    @cached_property
    def _spelled(self) -> list[str]:
        return self.vocabulary.tolist()

    def words_of(self, caption: int) -> list[str]:
        """The caption's words."""
        return [self._spelled[word] for word in self.words[self.starts[caption] : self.starts[caption + 1]].tolist()]

    def texts(self) -> list[str]:
        """All captions, as their words."""
        return [" ".join(self.words_of(caption)) for caption in range(len(self.starts) - 1)]

    def options_of(self, caption: int, candidates: int = SUBSTITUTES) -> list[list[str]]:
        """For each of its words the substitutes among the best `candidates` predictions; none for stop words."""
        rows = self.options[self.starts[caption] : self.starts[caption + 1]]
        kept = rows >= 0
        kept[:, candidates:SUBSTITUTES] = False
        entries = iter(rows[kept].tolist())
        return [[self._spelled[entry] for entry in islice(entries, count)] for count in kept.sum(1).tolist()]

    def take(self, captions: np.ndarray) -> Substitutes:
        """Those of some captions, in the given order."""
        lengths = np.diff(self.starts)[captions]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(starts[-1]) + np.repeat(self.starts[captions] - starts[:-1], lengths)
        return Substitutes(self.vocabulary, self.words[places], self.options[places], starts)

    @property
    def empty(self) -> bool:
        """Whether nothing may replace any word."""
        return not any((self.options[start : start + 4096] >= 0).any() for start in range(0, len(self.options), 4096))

    def save(self, folder: Path) -> None:
        """Write .npy files without pickles, all or nothing. What is there already is replaced."""
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir(parents=True)
        for field in fields(self):
            np.save(part / f"{field.name}.npy", getattr(self, field.name))
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)

    @classmethod
    def load(cls, folder: Path) -> Substitutes | None:
        """Map what `save` wrote; None if there is none or it is damaged."""
        try:
            return cls(*(np.asarray(np.load(folder / f"{field.name}.npy", mmap_mode="r")) for field in fields(cls)))
        except (OSError, EOFError, ValueError):
            return None

    @classmethod
    def join(cls, parts: Sequence[Substitutes]) -> Substitutes:
        """Those of several corpora as of one, in order."""
        vocabulary = np.unique(np.concatenate([part.vocabulary for part in parts]))
        columns = max(part.options.shape[1] for part in parts)
        words, options, starts = [], [], [np.zeros(1, dtype=np.int64)]
        for part in parts:
            entry = np.append(np.searchsorted(vocabulary, part.vocabulary), -1).astype(np.int32)
            missing = columns - part.options.shape[1]
            words.append(entry[part.words])
            options.append(np.pad(entry[part.options], ((0, 0), (0, missing)), constant_values=-1))
            starts.append(starts[-1][-1] + part.starts[1:])
        return cls(vocabulary, np.concatenate(words), np.concatenate(options), np.concatenate(starts))

    @classmethod
    def build(cls, words: Sequence[Sequence[str]], options: Sequence[Sequence[Sequence[str]]]) -> Substitutes:
        """From plain lists: words by caption, and substitutes by caption and word, empty where a rank has none."""
        vocabulary, entry = np.unique(
            [""] + [w for caption in words for w in caption] + [o for c in options for w in c for o in w],
            return_inverse=True,
        )
        total = sum(map(len, words))
        lengths = np.array([len(w) for c in options for w in c], dtype=np.int64)
        columns = max(SUBSTITUTES, lengths.max(initial=0))
        table = np.full((total, columns), -1, dtype=np.int32)
        # The empty string is entry 0.
        table[np.arange(columns) < lengths.reshape(-1, 1)] = np.where(entry[1 + total :] == 0, -1, entry[1 + total :])
        starts = np.concatenate([[0], np.cumsum([len(caption) for caption in words])]).astype(np.int64)
        return cls(vocabulary, entry[1 : 1 + total].astype(np.int32), table, starts)
