"""What may replace each word of a caption: proposals of a masked language model, made once per corpus."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 512
"""Captions in one pass; bounds memory, changes no result."""

_STOP_WORDS = """
    a about above across after against all along also am an and any are around as at be because been before behind
    being below beneath beside between beyond both but by can could did do does doing down during each few for from
    further had has have having he her here hers him his how i if in inside into is it its itself just me more most
    my near no nor not now of off on once one only onto or other our out outside over own per same she should so
    some such than that the their them then there these they this those through to too toward towards under until up
    upon us very was we were what when where which while who whom why will with within without would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Function words are never replaced, and never put in (as in BERT-Attack, Li et al. 2020)."""


def split_words(caption: str) -> list[str]:
    """Lower-case words; punctuation dropped, hyphens and slashes split.

    Example:
        >>> split_words("A man, half-asleep!")
        ['a', 'man', 'half', 'asleep']
    """
    return re.sub(r"[^\w\s']", "", re.sub(r"[-/]", " ", caption.lower())).split()


@dataclass(frozen=True)
class Substitutes:
    """For each caption its words, and for each word what a masked language model would put there, best first.

    Depends on captions and language model only, so all trials of a study share it.

    Attributes:
        vocabulary: (entries,) every word used.
        words: (words of all captions,) int32 entries.
        options: (words of all captions, count) int32 entries, -1 where there are no more.
        starts: (captions + 1,) int64, where each caption's words begin.
    """

    vocabulary: np.ndarray
    words: np.ndarray
    options: np.ndarray
    starts: np.ndarray

    def words_of(self, caption: int) -> list[str]:
        """The caption's words."""
        return [str(word) for word in self.vocabulary[self.words[self.starts[caption] : self.starts[caption + 1]]]]

    def texts(self) -> list[str]:
        """All captions, as their words."""
        return [" ".join(self.words_of(caption)) for caption in range(len(self.starts) - 1)]

    def options_of(self, caption: int) -> list[list[str]]:
        """For each of its words the substitutes; none for stop words."""
        rows = self.options[self.starts[caption] : self.starts[caption + 1]]
        return [self.vocabulary[row[row >= 0]].tolist() for row in rows]

    def take(self, captions: np.ndarray) -> Substitutes:
        """Those of some captions, in the given order."""
        lengths = np.diff(self.starts)[captions]
        places = np.concatenate([np.arange(self.starts[c], self.starts[c + 1]) for c in captions])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        return Substitutes(self.vocabulary, self.words[places], self.options[places], starts)

    def save(self, path: Path) -> None:
        """Write as .npz without pickles, all or nothing."""
        part = path.with_suffix(".part.npz")
        np.savez(part, vocabulary=self.vocabulary, words=self.words, options=self.options, starts=self.starts)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Substitutes:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**arrays)

    @classmethod
    def build(
        cls, words: Sequence[Sequence[str]], options: Sequence[Sequence[Sequence[str]]], count: int
    ) -> Substitutes:
        """From plain lists: words by caption, and substitutes by caption and word."""
        vocabulary, entry = np.unique(
            [""] + [w for caption in words for w in caption] + [o for c in options for w in c for o in w],
            return_inverse=True,
        )
        total = sum(map(len, words))
        table = np.full((total, count), -1, dtype=np.int32)
        lengths = np.array([len(w) for c in options for w in c], dtype=np.int64)
        table[np.arange(count) < lengths.reshape(-1, 1)] = entry[1 + total :]
        starts = np.concatenate([[0], np.cumsum([len(caption) for caption in words])]).astype(np.int64)
        return cls(vocabulary, entry[1 : 1 + total].astype(np.int32), table, starts)


@torch.no_grad()
def masked_lm_substitutes(
    captions: Sequence[str],
    masked_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    compat: bool = False,
) -> Substitutes:
    """BERT-Attack's candidates (Li et al. 2020): one forward pass a caption, nothing masked.

    A word's candidates are the `count` best predictions at its own first token; kept are whole alphabetic words that
    are neither the word itself nor a stop word. Stop words get none.

    Args:
        captions: of the corpus.
        masked_lm: in eval mode.
        tokenizer: its own.
        count: candidates per word.
        compat: do as the published code of Co-Attack and SGA does. It reads the predictions one token early (those
            at `[CLS]` for the first word), and what it drops from the best `count` is not made up for.
    """
    device = next(masked_lm.parameters()).device
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    usable = [token.isalpha() and token not in STOP_WORDS for token in vocabulary]
    words = [split_words(caption) for caption in captions]
    options: list[list[list[str]]] = []
    longest = masked_lm.config.max_position_embeddings
    wanted = count if compat else min(count + 1, sum(usable))
    for start in range(0, len(words), BATCH):
        chunk = words[start : start + BATCH]
        batch = tokenizer(
            chunk,
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        logits = masked_lm(batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)).logits
        if not compat:
            logits = logits.masked_fill(~torch.tensor(usable, device=device), -torch.inf)
        best = logits.topk(wanted, dim=-1).indices.tolist()
        for row, caption in enumerate(chunk):
            found: list[list[str]] = [[] for _ in caption]
            for position, word in reversed(list(enumerate(batch.word_ids(row)))):
                if word is not None and caption[word] not in STOP_WORDS:
                    proposals = (vocabulary[i] for i in best[row][position - compat] if usable[i])
                    found[word] = [proposal for proposal in proposals if proposal != caption[word]][:count]
            options.append(found)
    return Substitutes.build(words, options, count)
