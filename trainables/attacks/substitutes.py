"""What may replace each word of a caption: proposals of a masked language model, made once per corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, product
from pathlib import Path
from unicodedata import category

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainables.attacks.quirks import FIRST_WORDS, Quirks
from trainables.captions import core, put

SUBSTITUTES = 10
"""Predictions kept per word; attacks may use fewer."""

PIECE_SUBSTITUTES, COMBINATIONS = 4, 24
"""Under `subword_product`: predictions read per piece of a word, and combinations of them that are looked at."""

LOGIT_CUT = 0.3
"""Under `logit_cut`."""

BATCH = 64
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


@torch.no_grad()
def masked_lm_substitutes(
    texts: Sequence[str],
    masked_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quirks: Quirks = frozenset(),
) -> Substitutes:
    """BERT-Attack's candidates (Li et al. 2020): one forward pass a caption, nothing masked.

    A word's candidates are the `SUBSTITUTES` best predictions at its own first token; kept are whole alphabetic words
    that are neither the word itself nor a stop word. Stop words get none. As in the literature, the model reads the
    words without their punctuation; they have it again where one is replaced.

    Args:
        texts: of the corpus's captions, see `captions`.
        masked_lm: in eval mode.
        tokenizer: its own.
        quirks: of which `SUBSTITUTE_QUIRKS` matter.
    """
    device = masked_lm.device
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    usable = _is_new_word if "symbols" in quirks else _is_alphabetic_word
    special = set(tokenizer.all_special_tokens)  # an attacker types text
    fit = [usable(token) and token not in special for token in vocabulary]
    unfit = ~torch.tensor(fit, device=device)
    refill, early = "no_refill" not in quirks, "cls_offset" in quirks
    wanted = min(SUBSTITUTES + 1, sum(fit)) if refill else SUBSTITUTES  # one more, as the word itself is dropped
    written = [text.split() for text in texts]
    words = [[word[core(word)] for word in caption] for caption in written]
    seen = [caption[:FIRST_WORDS] for caption in words] if "first_30_words" in quirks else words
    options: list[list[list[str]]] = [[[] for _ in caption] for caption in words]
    pieces: dict[int, list[tuple[int, int, list[list[int]]]]] = {}
    order = sorted(range(len(words)), key=lambda row: len(words[row]))  # saves padding
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = tokenizer(
            [seen[row] for row in rows],
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=masked_lm.config.max_position_embeddings,
            return_tensors="pt",
        )
        places: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            for position, word in enumerate(batch.word_ids(index)):
                if word is not None and words[row][word] not in STOP_WORDS:
                    places.setdefault((index, word), []).append(position - early)
        logits = _logits_at(
            [(index, position) for (index, _), own in places.items() for position in own],
            masked_lm,
            batch["input_ids"].to(device),
            batch["attention_mask"].to(device),
            len(vocabulary),
        )
        firsts = dict(zip(places, accumulate(map(len, places.values()), initial=0), strict=False))
        whole = [key for key, own in places.items() if len(own) == 1 or "subword_product" not in quirks]
        scores = logits[torch.tensor([firsts[key] for key in whole], dtype=torch.int64, device=device)]
        heights, best = (scores.masked_fill(unfit, -torch.inf) if refill else scores).topk(wanted)
        if "logit_cut" in quirks:
            best = best.masked_fill(heights < LOGIT_CUT, tokenizer.pad_token_id)
        for (index, word), tokens in zip(whole, best.tolist(), strict=True):
            text = words[rows[index]][word]
            found = [vocabulary[token] if fit[token] and vocabulary[token] != text else "" for token in tokens]
            options[rows[index]][word] = [text for text in found if text][:SUBSTITUTES] if refill else found
        for index, word in places.keys() - set(whole):
            first = firsts[index, word]
            best = logits[first : first + len(places[index, word])].topk(PIECE_SUBSTITUTES).indices
            pieces.setdefault(len(best), []).append((rows[index], word, best.tolist()))
    for same_length in pieces.values():
        for start in range(0, len(same_length), BATCH // 4):
            part = same_length[start : start + BATCH // 4]
            plausible = _plausible([best for _, _, best in part], masked_lm)
            for (row, word, _), combinations in zip(part, plausible, strict=True):
                joined = [_joined([vocabulary[token] for token in tokens]) for tokens in combinations]
                kept = [text if usable(text) and text != words[row][word] else "" for text in joined]
                options[row][word] = [""] * SUBSTITUTES + kept
    return Substitutes.build(
        written,
        [
            [
                [put(option, word) if option else "" for option in found]
                for word, found in zip(caption, ways, strict=True)
            ]
            for caption, ways in zip(written, options, strict=True)
        ],
    )


def _logits_at(
    places: Sequence[tuple[int, int]], masked_lm: PreTrainedModel, tokens: Tensor, mask: Tensor, entries: int
) -> Tensor:
    """Logits (places, entries) at (caption, position) of each; the head, half of the work, sees nothing else.

    Some models have more logits than their tokenizer has entries, to make sizes round.
    """
    at = torch.tensor(places, dtype=torch.int64, device=tokens.device).reshape(-1, 2)
    head = masked_lm.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][at[:, 0], at[:, 1]],))
    try:
        return masked_lm(tokens, attention_mask=mask).logits[:, :entries]
    finally:
        hook.remove()


def _is_new_word(token: str) -> bool:
    return "##" not in token and token not in STOP_WORDS and len(token.split()) == 1


def _is_alphabetic_word(token: str) -> bool:
    letters = all(letter.isalpha() or category(letter).startswith("M") for letter in token)
    return letters and token[:1].isalpha() and token not in STOP_WORDS


def _joined(pieces: Sequence[str]) -> str:
    """WordPiece tokens as text; no single word if one that begins a word stands behind the first."""
    return " ".join(pieces).replace(" ##", "")


def _plausible(words: Sequence[Sequence[Sequence[int]]], masked_lm: PreTrainedModel) -> list[list[list[int]]]:
    """For each word the first combinations of its pieces' options, the one first that the model, alone, expects most.

    Args:
        words: (words, pieces, options) tokens.
        masked_lm: sees a combination and nothing around it.
    """
    tokens = torch.tensor([list(islice(product(*options), COMBINATIONS)) for options in words], device=masked_lm.device)
    logs = masked_lm(tokens.flatten(0, 1)).logits.log_softmax(-1).view(*tokens.shape, -1)
    expected = logs.gather(-1, tokens[..., None]).mean((2, 3))
    order = expected.argsort(dim=1, descending=True, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)).tolist()
