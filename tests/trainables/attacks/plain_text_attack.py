"""The attack on words on lists of strings, one caption after another: what the one on tensors has to equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.lexicon import lexicon_of
from trainables.attacks.text import Importance, Misfit, embedding_divergence
from trainables.models import RetrievalModel

ENCODE_BATCH = 64

Encode = Callable[[Sequence[str]], Tensor]


@torch.no_grad()
def encode_captions(model: RetrievalModel, captions: Sequence[str], max_tokens: int, device: torch.device) -> Tensor:
    """L2-normalised float32 features, (captions, dim).

    Captions are encoded in order of length, so that there is little padding. For CLIP's causal text tower, which is
    read at the end-of-text token, leaving padding out is exact.
    """
    ids = lexicon_of(model.tokenizer).word_tokens(captions, max_tokens)
    lengths = np.array([len(own) for own in ids])
    order = lengths.argsort(kind="stable")
    parts = []
    size = ENCODE_BATCH
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
