"""BERT-Attack as Co-Attack, SGA, CMI-Attack and DRA publish it: one caption, one word, one candidate after the other.

Slow and plain on purpose. `captions` are cleaned strings; a victim reads strings. What the published code does wrong is
done wrong here where a flag of `Reading` says so.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
MARKS = (*'.-/?",b&!@%^*()+=<>|:;～·', "a the")
STOP_WORDS: frozenset[str] = frozenset(_STOP_WORDS.split()) | frozenset(MARKS)
"""292 entries: TextFooler's 266 words (Jin et al. 2020, as TextAttack keeps them), "some", and marks."""

MAX_WORDS = 30


def clean(caption: str) -> str:
    """Lower case; `,.'!?"()*#:;~` dropped; hyphens and slashes to spaces; spaces squeezed; at most 30 words."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower()).replace("-", " ").replace("/", " ")
    text = re.sub(r"\s{2,}", " ", text).strip()
    return " ".join(text.split(" ")[:MAX_WORDS])


@dataclass(frozen=True)
class Reading:
    """How a caption's words are chosen and what is tried for them; every default is the published code's.

    Attributes:
        model: BERT with its language model's head.
        tokenizer: Its WordPiece tokenizer.
        max_length: Tokens of a caption, `[CLS]` included; 30 for ALBEF and TCL, 77 for CLIP.
        row_before: Candidates of a word are read at the token before it: `[CLS]` is not skipped.
        end_token: Whether `[SEP]` ends the caption.
        stop_words: Never replaced and never put.
        top_k: Predictions read at each piece.
        threshold: Of the logits, below which candidates of a word of one piece end.
        combinations: A word of several pieces is replaced by combinations of what is predicted at each; otherwise by
            what is predicted at its first.
        refill: `top_k` predictions that may be put are read at a piece, whatever their ranks.
        letters_only: Nothing is put but words of letters.
        one_word: Combinations of several words, which count as one, are left out.
        unknown: A word's importance is asked with `[UNK]` in its place; otherwise by squared distance without it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int = 30
    row_before: bool = True
    end_token: bool = False
    stop_words: frozenset[str] = STOP_WORDS
    top_k: int = 10
    threshold: float | None = 0.3
    combinations: bool = True
    refill: bool = False
    letters_only: bool = False
    one_word: bool = False
    unknown: bool = True

    def pieces(self, text: str) -> list[str]:
        """Of a word or a caption."""
        return self.tokenizer.tokenize(text)

    def ids(self, text: str) -> list[int]:
        """What the language model reads."""
        kept = self.pieces(text)[: self.max_length - 1 - self.end_token]
        first = self.tokenizer.cls_token or self.tokenizer.bos_token
        ends = [self.tokenizer.sep_token or self.tokenizer.eos_token] if self.end_token else []
        return self.tokenizer.convert_tokens_to_ids([first, *kept, *ends])


def language_logits(reading: Reading, ids: list[int]) -> torch.Tensor:
    """`(tokens, vocabulary)` of one row of ids, padded to the reading's length as published."""
    padding = [reading.tokenizer.pad_token_id] * max(0, reading.max_length - len(ids))
    row, mask = torch.tensor([[*ids, *padding], [1] * len(ids) + [0] * len(padding)], device=reading.model.device)
    with torch.no_grad():
        return reading.model(input_ids=row[None], attention_mask=mask[None]).logits[0].float()


def piece_spans(reading: Reading, words: Sequence[str]) -> list[tuple[int, int]]:
    """Of every word, from which to before which piece of the caption it goes; `[CLS]` is not counted."""
    spans, start = [], 0
    for word in words:
        end = start + len(reading.pieces(word))
        spans.append((start, end))
        start = end
    return spans


def joined(reading: Reading, ids: Sequence[int]) -> str:
    """Pieces as text: `##` pieces are glued to what stands before them."""
    return " ".join(reading.tokenizer.convert_ids_to_tokens(list(ids))).replace(" ##", "").strip()


def may_be_put(reading: Reading, candidate: str, word: str) -> bool:
    """Not the word itself, no piece of a word, no stop word."""
    dropped = candidate == word or "##" in candidate or candidate in reading.stop_words
    kinds = (reading.letters_only and not candidate.isalpha()) or (reading.one_word and " " in candidate)
    return not (dropped or kinds)


def word_candidates(reading: Reading, word: str, logits: torch.Tensor) -> list[str]:
    """Candidates of one word from the `(pieces, vocabulary)` logits at its pieces.

    One piece: the best `top_k` until the logit falls below the threshold. Several: four a piece, the first 24
    combinations, in rising pseudo-perplexity of the combination alone (cross-entropy of each piece at its own place,
    averaged).
    """
    if len(logits) == 0:
        return []
    if len(logits) == 1 or not reading.combinations:
        found = []
        best = logits[0].topk(len(logits[0]) if reading.refill else reading.top_k)
        for token, logit in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            if reading.threshold is not None and logit < reading.threshold:
                break
            found.append(reading.tokenizer.convert_ids_to_tokens(token))
        return [text for text in found if may_be_put(reading, text, word)][: reading.top_k]
    combinations = list(itertools.islice(itertools.product(*logits.topk(4).indices.tolist()), 24))
    losses = []
    for combination in combinations:
        row = torch.tensor(combination, device=reading.model.device)
        with torch.no_grad():
            losses.append(float(F.cross_entropy(reading.model(input_ids=row[None]).logits[0].float(), row)))
    order = sorted(range(len(combinations)), key=lambda i: losses[i])
    texts = [joined(reading, combinations[i]) for i in order]
    return [text for text in texts if may_be_put(reading, text, word)]


def masked_lm_candidates(reading: Reading, caption: str) -> list[list[str]]:
    """Per word of the caption what may be put for it, none for stop words; the caption is read unmasked, once."""
    words = caption.split(" ")
    logits = language_logits(reading, reading.ids(caption))
    shift, found = 0 if reading.row_before else 1, []
    for word, (start, end) in zip(words, piece_spans(reading, words), strict=True):
        beyond = start > reading.max_length - 2
        rows = logits[start + shift : end + shift]
        found.append([] if beyond or word in reading.stop_words else word_candidates(reading, word, rows))
    return found


Features = Callable[[Sequence[str]], torch.Tensor]
"""Texts to `(texts, dim)` embeddings of length 1."""


def divergence(clean_features: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`KL(softmax(clean) || softmax(other))` of each row, summed over the dimensions, in double precision."""
    p = clean_features.double().softmax(dim=-1)
    return (p * (p.log() - other.double().log_softmax(dim=-1))).sum(dim=-1)


def importance(reading: Reading, text_features: Features, caption: str) -> list[float]:
    """Of every word, stop words too, 32 at a time: the divergence when `[UNK]` stands in its place."""
    words, blank = caption.split(" "), ["[UNK]"] if reading.unknown else []
    masked = [" ".join([*words[:i], *blank, *words[i + 1 :]]) for i in range(len(words))]
    clean_features, scores = text_features([caption]), []
    for start in range(0, len(masked), 32):
        features = text_features(masked[start : start + 32])
        moved = divergence(clean_features, features) if reading.unknown else (features - clean_features).square().sum(1)
        scores += moved.tolist()
    return scores


Misfit = Callable[[torch.Tensor], torch.Tensor]
"""Embeddings of texts in place of one caption, `(texts, dim)`, to how bad each is for the victim."""


def attack_caption(
    text_features: Features,
    misfit: Misfit,
    reading: Reading,
    caption: str,
    words_changed: int = 1,
    proposed: list[list[str]] | None = None,
) -> str:
    """The caption with at most `words_changed` words replaced, most important first.

    Of the current text and the text with each candidate put for a word, the worst is kept; the current one where none
    is worse.

    Args:
        text_features: Of texts.
        misfit: What is raised.
        reading: How words are chosen and replaced.
        caption: Cleaned.
        words_changed: At most.
        proposed: What is tried for each word, in place of the masked language model's.
    """
    words = caption.split(" ")
    options = masked_lm_candidates(reading, caption) if proposed is None else proposed
    scores = importance(reading, text_features, caption)
    current, changed = list(words), 0
    for place in sorted(range(len(words)), key=lambda i: scores[i], reverse=True):
        if changed >= words_changed:
            break
        available = [words[place], *options[place]]
        texts = [" ".join([*current[:place], put, *current[place + 1 :]]) for put in available]
        worst = available[int(misfit(text_features(texts)).argmax())]
        current[place] = worst
        changed += worst != words[place]
    return " ".join(current)
