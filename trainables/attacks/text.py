"""Word substitution in captions: masked-LM candidates made once per corpus, chosen against the model in batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainables.models import RetrievalModel, tokenize

ENCODE_BATCH = 512
"""Captions encoded at once; bounds memory, changes no result."""

STOP_WORDS = frozenset(
    [
        "a",
        "about",
        "above",
        "across",
        "after",
        "against",
        "all",
        "along",
        "also",
        "am",
        "an",
        "and",
        "any",
        "are",
        "around",
        "as",
        "at",
        "be",
        "because",
        "been",
        "before",
        "behind",
        "being",
        "below",
        "beneath",
        "beside",
        "between",
        "beyond",
        "both",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "doing",
        "down",
        "during",
        "each",
        "few",
        "for",
        "from",
        "further",
        "had",
        "has",
        "have",
        "having",
        "he",
        "her",
        "here",
        "hers",
        "him",
        "his",
        "how",
        "i",
        "if",
        "in",
        "inside",
        "into",
        "is",
        "it",
        "its",
        "itself",
        "just",
        "me",
        "more",
        "most",
        "my",
        "near",
        "no",
        "nor",
        "not",
        "now",
        "of",
        "off",
        "on",
        "once",
        "one",
        "only",
        "onto",
        "or",
        "other",
        "our",
        "out",
        "outside",
        "over",
        "own",
        "per",
        "same",
        "she",
        "should",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "to",
        "too",
        "toward",
        "towards",
        "under",
        "until",
        "up",
        "upon",
        "us",
        "very",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "whom",
        "why",
        "will",
        "with",
        "within",
        "without",
        "would",
        "you",
        "your",
    ]
)
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
    captions: Sequence[str], masked_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int
) -> Substitutes:
    """BERT-Attack's candidates (Li et al. 2020): one forward pass a caption, nothing masked.

    A word's candidates are the `count` best predictions at its own first token; kept are whole alphabetic words that
    are neither the word itself nor a stop word. Stop words get none.
    """
    device = next(masked_lm.parameters()).device
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    usable = torch.tensor([t.isalpha() and t not in STOP_WORDS for t in vocabulary], device=device)
    words = [split_words(caption) for caption in captions]
    options: list[list[list[str]]] = []
    longest = masked_lm.config.max_position_embeddings
    for start in range(0, len(words), ENCODE_BATCH):
        chunk = words[start : start + ENCODE_BATCH]
        batch = tokenizer(
            chunk,
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        logits = masked_lm(batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)).logits
        best = logits.masked_fill(~usable, -torch.inf).topk(min(count + 1, int(usable.sum())), dim=-1).indices.tolist()
        for row, caption in enumerate(chunk):
            found: list[list[str]] = [[] for _ in caption]
            for position, word in reversed(list(enumerate(batch.word_ids(row)))):
                if word is not None and caption[word] not in STOP_WORDS:
                    proposals = (vocabulary[i] for i in best[row][position])
                    found[word] = [p for p in proposals if p != caption[word]][:count]
            options.append(found)
    return Substitutes.build(words, options, count)


@torch.no_grad()
def encode_captions(model: RetrievalModel, captions: Sequence[str], max_tokens: int, device: torch.device) -> Tensor:
    """L2-normalised float32 features, (captions, dim), encoded in order of length to save padding."""
    tokens, mask = tokenize(model, captions, max_tokens)
    lengths = mask.sum(1)
    order = lengths.argsort(stable=True)
    parts = []
    for rows in order.split(ENCODE_BATCH):
        longest = int(lengths[rows[-1]])
        features = model.encode_text(tokens[rows, :longest].to(device), mask[rows, :longest].to(device))
        parts.append(F.normalize(features.float(), dim=-1))
    return torch.cat(parts)[order.argsort().to(device)]


def attack_captions(
    model: RetrievalModel,
    captions: Sequence[int] | np.ndarray,
    substitutes: Substitutes,
    image_features: Tensor,
    *,
    words: int,
    count: int,
    max_tokens: int,
) -> list[str]:
    """Change at most `words` words of each caption so that it fits its image worse.

    Words are visited in falling importance, which is how far the caption's embedding moves when the word is left out
    (squared L2, as Jin et al. 2020); the substitute with the lowest cosine to the image's embedding is taken if it is
    lower than before. All captions advance together, so the encoder sees large batches. Deterministic, and each
    caption's result depends on nothing but itself.

    Args:
        model: in eval mode.
        captions: rows of `substitutes`.
        substitutes: candidates for the whole corpus.
        image_features: (captions, dim) L2-normalised, of the caption's image.
        words: largest number of changed words.
        count: substitutes tried per word.
        max_tokens: where captions are cut.

    Returns:
        The attacked captions.
    """
    device = image_features.device
    current = [substitutes.words_of(caption) for caption in captions]
    if words == 0:
        return [" ".join(text) for text in current]

    options = [substitutes.options_of(caption) for caption in captions]
    attackable = [[place for place, found in enumerate(caption) if found] for caption in options]
    shortened = [
        " ".join(text[:place] + text[place + 1 :])
        for text, places in zip(current, attackable, strict=True)
        for place in places
    ]
    clean = encode_captions(model, [" ".join(text) for text in current], max_tokens, device)
    score = (clean * image_features).sum(1).tolist()
    if not shortened:
        return [" ".join(text) for text in current]
    owner = torch.tensor([row for row, places in enumerate(attackable) for _ in places], device=device)
    moved = (encode_captions(model, shortened, max_tokens, device) - clean[owner]).square().sum(1).tolist()
    queue: list[list[int]] = []
    taken = 0
    for places in attackable:
        importance = dict(zip(places, moved[taken : taken + len(places)], strict=True))
        taken += len(places)
        queue.append(sorted(places, key=lambda place: -importance[place]))

    left = [words] * len(current)
    while True:
        active = [row for row in range(len(current)) if left[row] and queue[row]]
        if not active:
            return [" ".join(text) for text in current]
        tries: list[tuple[int, int, str]] = []
        for row in active:
            place = queue[row].pop(0)
            tries += [(row, place, option) for option in options[row][place][:count]]
        texts = [" ".join([*current[row][:place], option, *current[row][place + 1 :]]) for row, place, option in tries]
        rows = torch.tensor([row for row, _, _ in tries], device=device)
        fits = (encode_captions(model, texts, max_tokens, device) * image_features[rows]).sum(1).tolist()
        best: dict[int, tuple[float, int, str]] = {}
        for (row, place, option), fit in zip(tries, fits, strict=True):
            if fit < best.get(row, (score[row],))[0]:
                best[row] = (fit, place, option)
        for row, (fit, place, option) in best.items():
            score[row] = fit
            current[row][place] = option
            left[row] -= 1
