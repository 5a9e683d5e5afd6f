"""A masked language model proposes what may replace each word of a caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice, pairwise, product
from typing import TypeVar
from unicodedata import category

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainables.attacks.quirks import FIRST_WORDS, Quirks
from trainables.attacks.substitutes import STOP_WORDS, SUBSTITUTES, Substitutes
from trainables.captions import core
from trainables.errors import InputError
from trainables.models.tokenizers import without_end, word_entries
from trainables.precision import autocast, full_precision

Value = TypeVar("Value", bound=Hashable)

PIECE_SUBSTITUTES, COMBINATIONS = 4, 24
"""Under `subword_product`: predictions read per piece of a word, and combinations of them that are looked at."""

LOGIT_CUT = 0.3
"""Under `logit_cut`."""

BATCH = {"cuda": 512, "cpu": 64}
"""Captions in one pass; bounds memory, changes no result."""


class Proposer:
    """BERT-Attack's candidates (Li et al. 2020): one forward pass a caption, nothing masked.

    A word's candidates are the `SUBSTITUTES` best predictions at its own first token; kept are whole alphabetic words
    in lower case, as captions are, that are neither the word itself nor a stop word. Stop words get none. Which entries
    are whole words is read off the tokenizer, however it marks them; one of characters proposes nothing. As in the
    literature, the model reads the words without their punctuation; they have it again where one is replaced.

    On a GPU the model computes in bfloat16; its head, and so the order of the predictions, is float32 everywhere.

    Args:
        masked_lm: in eval mode, on the device that computes.
        tokenizer: its own.
        quirks: of which `SUBSTITUTE_QUIRKS` matter.

    Raises:
        InputError: a quirk that its tokenizer cannot have.
    """

    def __init__(
        self, masked_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, quirks: Quirks = frozenset()
    ) -> None:
        if "subword_product" in quirks and not _marks_pieces_as_bert(tokenizer):
            raise InputError("quirk subword_product joins BERT's word pieces; this masked language model has others")
        if "no_end_token" in quirks and not (tokenizer.cls_token or tokenizer.bos_token):
            raise InputError("quirk no_end_token leaves a caption its first token; this masked language model has none")
        self._masked_lm, self._quirks = masked_lm, quirks
        self._tokenizer = without_end(tokenizer) if "no_end_token" in quirks else tokenizer
        self._words = word_entries(tokenizer)
        self._usable = _is_new_word if "symbols" in quirks else _is_alphabetic_word
        self._fit = np.array([self._usable(word) for word in self._words])

    def reads(self, texts: Iterable[str]) -> bool:
        """Whether words are what it predicts: of the texts', it knows a tenth at least. Of letters, next to none."""
        known, counts = set(self._words), Counter[str]()
        for written, count in Counter(chain.from_iterable(map(str.split, texts))).items():
            counts[written[core(written)]] += count
        asked = {word: count for word, count in counts.items() if word and word not in STOP_WORDS}
        return 10 * sum(count for word, count in asked.items() if word in known) >= sum(asked.values())

    @torch.no_grad()
    def propose(self, texts: Sequence[str], silent: bool = False) -> Substitutes:
        """Substitutes for the words of some captions' texts; none at all if `silent`."""
        written = list(map(str.split, texts))
        starts = np.cumsum([0, *map(len, written)], dtype=np.int64)
        spelled, word = _numbered(chain.from_iterable(written))
        places = list(map(core, spelled))
        cores = [text[place] for text, place in zip(spelled, places, strict=True)]
        affixes, affix = _numbered(
            (text[: at.start], text[at.stop :]) for text, at in zip(spelled, places, strict=True)
        )
        entries, found = self._entries(cores, word, starts, silent)
        rows, ranks = np.nonzero(found >= 0)
        # The word with something else in place of its core, see `captions.put`; each that comes up is spelled once.
        ways, way = np.unique(affix[word[rows]] * len(entries) + found[rows, ranks], return_inverse=True)
        options = [
            entries[option].join(affixes[around])
            for around, option in zip(*(part.tolist() for part in np.divmod(ways, len(entries))), strict=True)
        ]
        vocabulary, placed = np.unique(["", *spelled, *options], return_inverse=True)
        placed = placed.astype(np.int32)
        table = np.full((len(word), max(SUBSTITUTES, 1 + ranks.max(initial=0))), -1, dtype=np.int32)
        table[rows, ranks] = placed[1 + len(spelled) :][way]
        return Substitutes(vocabulary, placed[1:][word], table, starts)

    def _entries(
        self, cores: Sequence[str], word: np.ndarray, starts: np.ndarray, silent: bool
    ) -> tuple[list[str], np.ndarray]:
        """What may stand for the words' cores.

        Args:
            cores: of the different words.
            word: (words,) which of them each is.
            starts: (captions + 1,) where each caption's words begin.
            silent: nothing may.

        Returns:
            Different texts, and (words, ranks) which of them each rank proposes, -1 for none.
        """
        entries, entry = _numbered(self._words)
        product_of_pieces = "subword_product" in self._quirks
        columns = SUBSTITUTES + (COMBINATIONS if product_of_pieces else 0)
        found = np.full((len(word), columns), -1, dtype=np.int64)
        asked = np.array([text != "" and text not in STOP_WORDS for text in cores], dtype=bool)[word]
        if silent or not asked.any():
            return entries, found
        tokens = self._tokenize(cores, word, starts)
        chosen = np.flatnonzero((tokens.word >= 0) & asked[tokens.word])
        rows, first, pieces = np.unique(tokens.word[chosen], return_index=True, return_counts=True)
        if not product_of_pieces:  # all others' predictions are not read
            chosen, first, pieces = chosen[first], np.arange(len(rows)), np.ones_like(pieces)
        best, raw = self._predict(tokens, chosen)
        number = {text: place for place, text in enumerate(entries)}
        own = np.array([number.get(text, -1) for text in cores])[word]
        whole = pieces == 1
        predicted = best[first[whole]]
        proposed = entry[predicted]
        kept = self._fit[predicted] & (proposed != own[rows[whole], None])
        if "no_refill" not in self._quirks:
            order = np.argsort(~kept, axis=1, kind="stable")[:, :SUBSTITUTES]
            proposed, kept = np.take_along_axis(proposed, order, 1), np.take_along_axis(kept, order, 1)
        found[rows[whole], : proposed.shape[1]] = np.where(kept, proposed, -1)
        for count in np.unique(pieces[~whole]).tolist():
            several = np.flatnonzero(pieces == count)
            for part in np.array_split(several, 1 + len(several) // 16):
                joined = self._joined(raw[first[part, None] + np.arange(count)])
                for row, texts in zip(rows[part].tolist(), joined, strict=True):
                    for rank, text in enumerate(texts, SUBSTITUTES):
                        if self._usable(text) and text != cores[word[row]]:
                            found[row, rank] = number.setdefault(text, len(number))
        return list(number), found

    def _tokenize(self, cores: Sequence[str], word: np.ndarray, starts: np.ndarray) -> _Tokens:
        """The words with single spaces between, as the model reads them."""
        lengths = np.array(list(map(len, cores)))[word]
        kept = lengths > 0
        if "first_30_words" in self._quirks:
            kept &= np.arange(len(word)) - np.repeat(starts[:-1], np.diff(starts)) < FIRST_WORDS
        places = np.flatnonzero(kept)
        spelled = [cores[place] for place in word[places].tolist()]
        bounds = np.searchsorted(places, starts).tolist()
        texts = [" ".join(spelled[start:end]) for start, end in pairwise(bounds)]
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(_longest(self._masked_lm, self._tokenizer))
        coded = backend.encode_batch(texts)
        counts = np.array(list(map(len, coded)))
        ids = np.fromiter(chain.from_iterable(code.ids for code in coded), dtype=np.int64)
        offsets = chain.from_iterable(chain.from_iterable(code.offsets for code in coded))
        begins, ends = np.fromiter(offsets, dtype=np.int64).reshape(-1, 2).T
        # In all texts as one, each followed by a space, every word reaches from its edge to the next one's.
        edges = np.cumsum([0, *(lengths[places] + 1)])
        caption = np.repeat(np.arange(len(texts)), counts)
        reached = ends + edges[bounds][caption]
        at = np.searchsorted(edges, reached - 1, side="right") - 1
        inside = (ends > begins) & (reached < edges[np.minimum(at + 1, len(places))])  # no token of a space alone
        return _Tokens(ids, caption, counts, np.where(inside, places[np.minimum(at, len(places) - 1)], -1))

    def _predict(self, tokens: _Tokens, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best predictions at some tokens: (tokens, `SUBSTITUTES` or one more) of entries that are words, unless
        quirks say otherwise, and (tokens, `PIECE_SUBSTITUTES`) of all."""
        refill, early = "no_refill" not in self._quirks, "cls_offset" in self._quirks
        # One more, as the word itself is dropped.
        wanted = min(SUBSTITUTES + 1, int(self._fit.sum())) if refill else SUBSTITUTES
        device, pad = self._masked_lm.device, self._tokenizer.pad_token_id
        unfit = ~torch.from_numpy(self._fit).to(device)
        begins = np.cumsum(tokens.counts) - tokens.counts
        caption, position = tokens.caption[chosen], chosen - begins[tokens.caption[chosen]] - early
        order = np.unique(caption)
        order = order[np.argsort(tokens.counts[order], kind="stable")]  # saves padding
        rank = np.zeros(len(begins), dtype=np.int64)
        rank[order] = np.arange(len(order))
        by_rank = np.argsort(rank[caption], kind="stable")
        size = BATCH["cuda" if device.type == "cuda" else "cpu"]
        edges = np.searchsorted(rank[caption[by_rank]], np.arange(0, len(order) + size, size))
        best, raw = [], []
        with autocast(device):
            for batch, (start, end) in enumerate(pairwise(edges)):
                captions, own = order[batch * size : (batch + 1) * size], by_rank[start:end]
                places = np.arange(tokens.counts[captions].max())
                mask = places < tokens.counts[captions, None]
                ids = np.where(mask, tokens.ids[(begins[captions, None] + places) % len(tokens.ids)], pad)
                at = np.stack([rank[caption[own]] - batch * size, position[own]], axis=1)
                logits = _logits_at(
                    torch.from_numpy(at).to(device),
                    self._masked_lm,
                    torch.from_numpy(ids).to(device),
                    torch.from_numpy(mask.astype(np.int64)).to(device),
                    len(self._words),
                )
                if "subword_product" in self._quirks:
                    raw.append(logits.topk(PIECE_SUBSTITUTES).indices)
                heights, highest = (logits.masked_fill(unfit, -torch.inf) if refill else logits).topk(wanted)
                if "logit_cut" in self._quirks:
                    highest = highest.masked_fill(heights < LOGIT_CUT, pad)
                best.append(highest)  # read at the end: the device is not waited for
        inverse = np.argsort(by_rank)
        return torch.cat(best).cpu().numpy()[inverse], torch.cat(raw).cpu().numpy()[inverse] if raw else np.empty(0)

    def _joined(self, best: np.ndarray) -> list[list[str]]:
        """For each word the first combinations of its pieces' options, the one first that the model, alone, expects
        most; no single word if a piece that begins a word stands behind the first.

        Args:
            best: (words, pieces, options) tokens.
        """
        _, pieces, options = best.shape
        ways = np.array(list(islice(product(range(options), repeat=pieces), COMBINATIONS)))
        tokens = torch.from_numpy(best[:, np.arange(pieces), ways]).to(self._masked_lm.device)
        with autocast(tokens.device):
            logits = self._masked_lm(tokens.flatten(0, 1)).logits
        logs = logits.float().log_softmax(-1).view(*tokens.shape, -1)
        expected = logs.gather(-1, tokens[..., None]).mean((2, 3))
        order = expected.argsort(dim=1, descending=True, stable=True)
        sorted_tokens = tokens.gather(1, order[..., None].expand_as(tokens)).tolist()
        spell = self._tokenizer.convert_ids_to_tokens
        return [[" ".join(spell(way)).replace(" ##", "") for way in word] for word in sorted_tokens]


def masked_lm_substitutes(
    texts: Sequence[str],
    masked_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quirks: Quirks = frozenset(),
) -> Substitutes:
    """Of a whole corpus at once, see `Proposer`."""
    proposer = Proposer(masked_lm, tokenizer, quirks)
    return proposer.propose(texts, silent=not proposer.reads(texts))


@dataclass(frozen=True)
class _Tokens:
    """Of all captions in a row: ids, the caption of each and the word whose part it is or -1; (captions,) counts."""

    ids: np.ndarray
    caption: np.ndarray
    counts: np.ndarray
    word: np.ndarray


def _numbered(values: Iterable[Value]) -> tuple[list[Value], np.ndarray]:
    """The different values, and for each which of them it is."""
    numbers: dict[Value, int] = {}
    found = np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
    return list(numbers), found


def _logits_at(places: Tensor, masked_lm: PreTrainedModel, tokens: Tensor, mask: Tensor, entries: int) -> Tensor:
    """Float32 logits (places, entries) at the (caption, position) of each row of `places`.

    The head, half of the work, sees nothing else, and computes in full precision: bfloat16 would make predictions equal
    that differ by less than 0.4 %. Some models have more logits than their tokenizer has entries, to make sizes round.
    """
    rows, positions = places.unbind(1)
    with ExitStack() as stack:

        def narrow(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
            stack.enter_context(full_precision())
            return (given[0][rows, positions].float(),)

        stack.callback(masked_lm.get_output_embeddings().register_forward_pre_hook(narrow).remove)
        logits = masked_lm(tokens, attention_mask=mask).logits
    chosen = logits[rows, positions] if logits.ndim == 3 else logits  # some heads do not call their embeddings
    return chosen[:, :entries].float()


def _longest(masked_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that it reads at once; RoBERTa counts positions from behind the one for padding."""
    longest = getattr(masked_lm.config, "max_position_embeddings", None) or tokenizer.model_max_length
    for name, module in masked_lm.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest -= module.padding_idx + 1
    return min(longest, tokenizer.model_max_length)


def _marks_pieces_as_bert(tokenizer: PreTrainedTokenizerBase) -> bool:
    return getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None) == "##"


def _is_new_word(token: str) -> bool:
    return "##" not in token and token not in STOP_WORDS and len(token.split()) == 1 and token == token.lower()


def _is_alphabetic_word(token: str) -> bool:
    letters = all(letter.isalpha() or category(letter).startswith("M") for letter in token)
    return letters and token[:1].isalpha() and token not in STOP_WORDS and token == token.lower()
