"""What may replace each word of a caption: proposals of a masked language model, made once per corpus."""

from __future__ import annotations

import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
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
from trainables.errors import InputError
from trainables.models.tokenizers import word_entries

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
    def load(cls, path: Path) -> Substitutes | None:
        """Read what `save` wrote; None if that is damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**arrays)
        except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error):
            return None

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
    in lower case, as captions are, that are neither the word itself nor a stop word. Stop words get none. Which entries
    are whole words is read off the tokenizer, however it marks them; one of characters proposes nothing. As in the
    literature, the model reads the words without their punctuation; they have it again where one is replaced.

    Args:
        texts: of the corpus's captions, see `captions`.
        masked_lm: in eval mode.
        tokenizer: its own.
        quirks: of which `SUBSTITUTE_QUIRKS` matter.

    Raises:
        InputError: a quirk that its tokenizer cannot have.
    """
    device = masked_lm.device
    vocabulary = word_entries(tokenizer)
    usable = _is_new_word if "symbols" in quirks else _is_alphabetic_word
    fit = [usable(word) for word in vocabulary]
    unfit = ~torch.tensor(fit, device=device)
    refill, early = "no_refill" not in quirks, "cls_offset" in quirks
    wanted = min(SUBSTITUTES + 1, sum(fit)) if refill else SUBSTITUTES  # one more, as the word itself is dropped
    written = [text.split() for text in texts]
    words = [[word[core(word)] for word in caption] for caption in written]
    seen = [caption[:FIRST_WORDS] for caption in words] if "first_30_words" in quirks else words
    options: list[list[list[str]]] = [[[] for _ in caption] for caption in words]
    if not _reads(vocabulary, words):
        return Substitutes.build(written, options)
    if "subword_product" in quirks and not _marks_pieces_as_bert(tokenizer):
        raise InputError("quirk subword_product joins BERT's word pieces; this masked language model has others")
    spelled = tokenizer.convert_ids_to_tokens(list(range(len(vocabulary))))
    pieces: dict[int, list[tuple[int, int, list[list[int]]]]] = {}
    order = sorted(range(len(words)), key=lambda row: len(words[row]))  # saves padding
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = tokenizer(
            [" ".join(filter(None, seen[row])) for row in rows],
            padding=True,
            truncation=True,
            max_length=_longest(masked_lm, tokenizer),
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        places: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            for position, word in _words_at(batch["offset_mapping"][index].tolist(), seen[row]):
                if words[row][word] not in STOP_WORDS:
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
                joined = [_joined([spelled[token] for token in tokens]) for tokens in combinations]
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
        logits = masked_lm(tokens, attention_mask=mask).logits
    finally:
        hook.remove()
    chosen = logits[at[:, 0], at[:, 1]] if logits.ndim == 3 else logits  # some heads do not call their embeddings
    return chosen[:, :entries]


def _words_at(spans: Sequence[Sequence[int]], words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Position of every token of a word, and that word's number.

    Args:
        spans: (tokens, 2) where each begins and ends in the words with spaces between; empty for special ones.
        words: of the caption; empty ones are not in its text.
    """
    kept = [number for number, word in enumerate(words) if word]
    begins = list(accumulate((len(words[number]) + 1 for number in kept), initial=0))
    for position, (begin, end) in enumerate(spans):
        if end > begin:
            place = bisect_right(begins, end - 1) - 1
            if end < begins[place + 1]:  # no token of the space alone
                yield position, kept[place]


def _longest(masked_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that it reads at once; RoBERTa counts positions from behind the one for padding."""
    longest = getattr(masked_lm.config, "max_position_embeddings", None) or tokenizer.model_max_length
    for name, module in masked_lm.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest -= module.padding_idx + 1
    return min(longest, tokenizer.model_max_length)


def _reads(vocabulary: Sequence[str], words: Sequence[Sequence[str]]) -> bool:
    """Whether words are what it predicts: of the captions', it knows a tenth at least. Of letters, it knows next to
    none."""
    known = set(vocabulary)
    asked = [word in known for caption in words for word in caption if word and word not in STOP_WORDS]
    return 10 * sum(asked) >= len(asked)


def _marks_pieces_as_bert(tokenizer: PreTrainedTokenizerBase) -> bool:
    return getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None) == "##"


def _is_new_word(token: str) -> bool:
    return "##" not in token and token not in STOP_WORDS and len(token.split()) == 1 and token == token.lower()


def _is_alphabetic_word(token: str) -> bool:
    letters = all(letter.isalpha() or category(letter).startswith("M") for letter in token)
    return letters and token[:1].isalpha() and token not in STOP_WORDS and token == token.lower()


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
