"""Attacks on captions: words replaced (BERT-Attack) or characters changed (LEAF), many captions at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.noise import step_keys, uniform
from trainables.attacks.quirks import FIRST_WORDS, TEXT_QUIRKS, Quirks
from trainables.models import RetrievalModel

ENCODE_BATCH = {"cuda": 512, "cpu": 64}
"""Captions encoded at once: many fill a GPU, few stay in a processor's cache. Changes no result."""

Encode = Callable[[Sequence[str]], Tensor]
"""Captions -> L2-normalised float32 features, (captions, dim)."""

Misfit = Callable[[Tensor, Tensor], Tensor]
"""(features (tries, dim), which caption each is a version of (tries,)) -> (tries,); the attack raises it."""

Importance = Literal["deletion", "unknown"]


@lru_cache(maxsize=4)
class WordTokens:
    """Token ids of captions, put together from those of their words, each of which is tokenised once.

    The tokenizers of CLIP, BERT and their like split at spaces before anything else, so the ids of a caption are those
    of its words, one after another. For a tokenizer that does otherwise, captions are tokenised as a whole.
    """

    PROBE = "a dog's half-asleep dog 2"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, Sequence[int]] = {}
        whole = tokenizer(self.PROBE, return_special_tokens_mask=True)
        tokens, special = whole["input_ids"], whole["special_tokens_mask"]
        first, last = special.index(0), len(special) - special[::-1].index(0)
        self._before, self._after = tokens[:first], tokens[last:]
        self._by_words = self._joined([self.PROBE], len(tokens)) == [tuple(tokens)]

    def __call__(self, captions: Sequence[str], max_tokens: int) -> Sequence[Sequence[int]]:
        """With special tokens, cut to `max_tokens`."""
        if self._by_words:
            return self._joined(captions, max_tokens)
        return self._tokenizer(list(captions), truncation=True, max_length=max_tokens)["input_ids"]

    def _joined(self, captions: Sequence[str], max_tokens: int) -> Sequence[Sequence[int]]:
        words = [caption.split() for caption in captions]
        new = [word for word in dict.fromkeys(chain.from_iterable(words)) if word not in self._ids]
        if new:
            self._ids.update(zip(new, self._tokenizer(new, add_special_tokens=False)["input_ids"], strict=True))
        room = max_tokens - len(self._before) - len(self._after)
        inside = (tuple(chain.from_iterable(map(self._ids.__getitem__, own)))[:room] for own in words)
        return [(*self._before, *ids, *self._after) for ids in inside]  # tuples weigh less on the garbage collector


@torch.no_grad()
def encode_captions(model: RetrievalModel, captions: Sequence[str], max_tokens: int, device: torch.device) -> Tensor:
    """L2-normalised float32 features, (captions, dim).

    Captions are encoded in order of length, so that there is little padding. For CLIP's causal text tower, which is
    read at the end-of-text token, leaving padding out is exact.
    """
    ids = WordTokens(model.tokenizer)(captions, max_tokens)
    lengths = np.array([len(own) for own in ids])
    order = lengths.argsort(kind="stable")
    parts = []
    size = ENCODE_BATCH["cuda" if device.type == "cuda" else "cpu"]
    for rows in np.split(order, range(size, len(order), size)):
        mask = np.arange(lengths[rows[-1]]) < lengths[rows, None]
        tokens = np.full(mask.shape, model.tokenizer.pad_token_id)
        tokens[mask] = list(chain.from_iterable(ids[row] for row in rows))
        features = model.encode_text(torch.from_numpy(tokens).to(device), torch.from_numpy(mask).long().to(device))
        parts.append(F.normalize(features.float(), dim=-1))
    return torch.cat(parts)[torch.from_numpy(order.argsort()).to(device)]


class CaptionEncoder:
    """Encodes every caption once: attacks on the same captions share most of their tries.

    Args:
        model: in eval mode.
        max_tokens: where captions are cut.
        device: of the model.
    """

    def __init__(self, model: RetrievalModel, max_tokens: int, device: torch.device) -> None:
        self._model, self._max_tokens, self._device = model, max_tokens, device
        self._place: dict[str, int] = {}
        self._features: Tensor | None = None

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """See `Encode`."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._place]
        if new:
            for caption in new:
                self._place[caption] = len(self._place)
            encoded = encode_captions(self._model, new, self._max_tokens, self._device)
            self._features = encoded if self._features is None else torch.cat([self._features, encoded])
        assert self._features is not None
        return self._features[torch.tensor([self._place[c] for c in captions], device=self._device)]


def away_from(image_features: Tensor) -> Misfit:
    """Lower the cosine to each caption's image, (captions, dim) L2-normalised: SGA's objective (Lu et al. 2023)."""
    return lambda features, rows: -(features * image_features[rows]).sum(1)


def embedding_divergence(features: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax(features) || softmax(clean)) of L2-normalised embeddings, (rows,): Co-Attack's distance.

    Unit vectors have nearly uniform softmaxes, so the values are of the order 1e-5, where float32 is too coarse.
    """
    logs = F.log_softmax(features.double(), -1)
    return (logs.exp() * (logs - F.log_softmax(clean.double(), -1))).sum(-1)


def divergence_from(clean: Tensor) -> Misfit:
    """Raise the divergence from each caption's clean embedding, (captions, dim) L2-normalised, as Co-Attack does."""
    return lambda features, rows: embedding_divergence(features, clean[rows])


def attack_words(
    encode: Encode,
    captions: Sequence[Sequence[str]],
    options: Sequence[Sequence[Sequence[str]]],
    misfit: Misfit,
    *,
    words: int,
    importance: Importance = "deletion",
) -> list[str]:
    """Change at most `words` words of each caption so that its misfit rises (Li et al. 2020).

    Words are visited in falling importance; the substitute with the highest misfit is taken if that is more than
    before. All captions advance together, so the encoder sees large batches. Deterministic, and each caption's result
    depends on nothing but itself.

    Args:
        encode: captions to features.
        captions: their words.
        options: for each word what may replace it; words without any are neither masked nor changed.
        misfit: what the attack raises.
        words: largest number of changed words.
        importance: how far the embedding moves, in squared L2, when the word is left out (Jin et al. 2020), or, in
            Co-Attack's KL, when it is replaced by the literal `[UNK]` as in the published code.

    Returns:
        The attacked captions.
    """
    current = [list(caption) for caption in captions]
    if words == 0 or not current:
        return [" ".join(text) for text in current]
    attackable = [[place for place, found in enumerate(caption) if found] for caption in options]
    blank: list[str] = [] if importance == "deletion" else ["[UNK]"]
    without = [
        " ".join([*text[:place], *blank, *text[place + 1 :]])
        for text, places in zip(current, attackable, strict=True)
        for place in places
    ]
    if not without:
        return [" ".join(text) for text in current]
    features = encode([*(" ".join(text) for text in current), *without])
    clean, masked = features[: len(current)], features[len(current) :]
    owner = torch.tensor([row for row, places in enumerate(attackable) for _ in places], device=clean.device)
    if importance == "deletion":
        moved = (masked - clean[owner]).square().sum(1)
    else:
        moved = embedding_divergence(clean[owner], masked)
    queues: list[list[int]] = []
    values = iter(moved.tolist())
    for places in attackable:
        weights = {place: next(values) for place in places}
        queues.append(sorted(places, key=lambda place: -weights[place]))

    reached = misfit(clean, torch.arange(len(current), device=clean.device)).tolist()
    left = [words] * len(current)
    while active := [row for row in range(len(current)) if left[row] and queues[row]]:
        tries: list[tuple[int, int, str]] = []
        for row in active:
            place = queues[row].pop(0)
            tries += [(row, place, option) for option in options[row][place]]
        texts = [" ".join([*current[row][:place], option, *current[row][place + 1 :]]) for row, place, option in tries]
        rows = torch.tensor([row for row, _, _ in tries], device=clean.device)
        best: dict[int, tuple[float, int, str]] = {}
        for (row, place, option), value in zip(tries, misfit(encode(texts), rows).tolist(), strict=True):
            if value > best.get(row, (reached[row],))[0]:
                best[row] = (value, place, option)
        for row, (value, place, option) in best.items():
            reached[row] = value
            current[row][place] = option
            left[row] -= 1
    return [" ".join(text) for text in current]


@dataclass(frozen=True)
class BertAttack(Attack):
    """Words replaced by a masked language model's proposals (Li et al. 2020), as used on vision-language models.

    Attributes:
        candidates: proposals tried per word.
        objective: `cross` lowers the similarity to the caption's image, `deviation` raises the divergence from the
            clean caption's embedding (Co-Attack's text step).
        quirks: any of `TEXT_QUIRKS`.
    """

    changes = frozenset({"text"})
    known_quirks = TEXT_QUIRKS
    words: int = 1
    candidates: int = 10
    objective: Literal["cross", "deviation"] = "cross"
    quirks: Quirks = frozenset()

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """Against the clean images."""
        return Attacked(batch.pixels, self.captions(batch, batch.clean_features(victim)))

    def captions(self, batch: Batch, image_features: Tensor) -> list[str]:
        """The attacked captions of the batch.

        Args:
            batch: its clean captions are attacked.
            image_features: (images, dim) L2-normalised, what `cross` leads away from.
        """
        table = batch.candidates(self.quirks)
        captions = [table.words_of(row) for row in batch.caption_rows]
        seen = FIRST_WORDS if "first_30_words" in self.quirks else None
        words = [caption[:seen] for caption in captions]
        if self.objective == "cross":
            misfit = away_from(image_features[batch.owner])
        else:
            clean = batch.encode([" ".join(caption) for caption in words])
            misfit = divergence_from(clean)
        attacked = attack_words(
            batch.encode,
            words,
            [table.options_of(row, self.candidates) for row in batch.caption_rows],
            misfit,
            words=self.words,
            importance="unknown" if "unk_importance" in self.quirks else "deletion",
        )
        return [
            " ".join([text, *caption[len(cut) :]]) for text, caption, cut in zip(attacked, captions, words, strict=True)
        ]


ROUNDING = 1e-6
"""Cosines that differ by less are the same: of captions that only differ in spaces, which tokenizers do not see."""

ALPHABET = "abcdefghijklmnopqrstuvwxyz "
"""Characters that may be put in; the empty string takes one out."""


@dataclass(frozen=True)
class CharacterAttack(Attack):
    """Characters inserted, replaced or deleted: the attack of LEAF (Rocamora et al. 2025), guided by the image.

    Of `positions` random places the one where a blank hurts most is chosen, then the best of `replacements` random
    characters there. The places between characters count too, so that one choice covers insertions.

    Attributes:
        characters: largest Levenshtein distance.
        positions: random places tried.
        replacements: random characters tried at the chosen place.
    """

    changes = frozenset({"text"})
    characters: int = 1
    positions: int = 20
    replacements: int = 20

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """Against the clean images; every step's randomness belongs to the caption."""
        current = batch.captions()
        misfit = away_from(batch.clean_features(victim)[batch.owner])
        everything = torch.arange(len(current), device=batch.pixels.device)
        reached = misfit(batch.encode(current), everything).tolist()
        for step in range(self.characters):
            draws = uniform(step_keys(batch.caption_keys, step), (2, max(self.positions, self.replacements))).tolist()
            spots = [
                sorted({int(draw * (2 * len(text) + 1)) for draw in draws[row][0][: self.positions]})
                for row, text in enumerate(current)
            ]
            tries = [(row, _edited(current[row], spot, " "), spot) for row, found in enumerate(spots) for spot in found]
            chosen = {row: spot for row, (_, _, spot) in _highest(batch.encode, misfit, tries, {}).items()}
            tries = [
                (row, _edited(current[row], spot, character), spot)
                for row, spot in chosen.items()
                for character in dict.fromkeys(
                    ["", *(ALPHABET[int(draw * len(ALPHABET))] for draw in draws[row][1][: self.replacements])]
                )
            ]
            bounds = dict(enumerate(reached))
            for row, (value, text, _) in _highest(batch.encode, misfit, tries, bounds).items():
                current[row], reached[row] = text, value
        return Attacked(batch.pixels, current)


def _edited(text: str, spot: int, character: str) -> str:
    """Odd spots are characters, even ones the gaps before them."""
    place, replace = divmod(spot, 2)
    return text[:place] + character + text[place + replace :]


def _highest(
    encode: Encode, misfit: Misfit, tries: list[tuple[int, str, int]], above: dict[int, float]
) -> dict[int, tuple[float, str, int]]:
    features = encode([text for _, text, _ in tries])
    values = misfit(features, torch.tensor([row for row, _, _ in tries], device=features.device)).tolist()
    best: dict[int, tuple[float, str, int]] = {}
    for (row, text, spot), value in zip(tries, values, strict=True):
        if value > (best[row][0] if row in best else above.get(row, -np.inf)) + ROUNDING:
            best[row] = (value, text, spot)
    return best
