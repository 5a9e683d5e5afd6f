"""Captions through a model's text encoder, many at a time and with little padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.lexicon import Captions, lexicon_of, padded
from trainables.models import RetrievalModel

ENCODE_BATCH = {"cuda": 512, "cpu": 64}
"""Captions encoded at once: many fill a GPU, few stay in a processor's cache. Changes no result."""

READ_FREELY = {"cpu"}
"""Devices whose values can be read without waiting for them."""

Encode = Callable[[Sequence[str]], Tensor]
"""Captions -> L2-normalised float32 features, (captions, dim)."""


def tokens_of(
    model: RetrievalModel, captions: Sequence[str], max_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask on the device, each int64 (captions, longest), padded at the end."""
    if isinstance(captions, Captions):
        told = _told(captions, device)
        return captions.lexicon.tokens(captions.rows.to(device), max_tokens, None if told is None else max(told))
    found = lexicon_of(model.tokenizer).word_tokens(captions, max_tokens)
    tokens, mask = padded(found, model.tokenizer.pad_token_id)
    return tokens.to(device), mask.to(device)


def _told(captions: Sequence[str], device: torch.device) -> list[int] | None:
    """Tokens of each caption at most, if it is not to be read."""
    if device.type in READ_FREELY or not isinstance(captions, Captions) or captions.longest is None:
        return None
    return captions.longest.tolist()


@torch.no_grad()
def encode_captions(model: RetrievalModel, captions: Sequence[str], max_tokens: int, device: torch.device) -> Tensor:
    """L2-normalised float32 features, (captions, dim).

    Captions are encoded in order of length, so that there is little padding. Where reading lengths would mean to wait
    for the device, those that tell how long they are at most are taken in the order they have. For CLIP's causal text
    tower, which is read at the end-of-text token, leaving padding out is exact.
    """
    tokens, mask = tokens_of(model, captions, max_tokens, device)
    told = _told(captions, device)
    order = None if told is not None else mask.sum(1).argsort(stable=True)
    if order is not None:
        tokens, mask = tokens[order], mask[order]
    lengths = mask.sum(1).tolist() if told is None else told
    size, parts = ENCODE_BATCH["cuda" if device.type == "cuda" else "cpu"], []
    for start in range(0, len(lengths), size):
        end = start + size
        longest = max(lengths[start:end])
        features = model.encode_text(tokens[start:end, :longest], mask[start:end, :longest])
        parts.append(F.normalize(features.float(), dim=-1))
    found = torch.cat(parts)
    return found if order is None else torch.empty_like(found).index_copy_(0, order, found)


class CaptionEncoder:
    """Encodes every caption once: attacks on the same captions share most of their tries.

    Args:
        model: in eval mode.
        max_tokens: where captions are cut.
        device: of the model.

    Attributes:
        lexicon: of the model's tokenizer.
    """

    def __init__(self, model: RetrievalModel, max_tokens: int, device: torch.device) -> None:
        self.lexicon = lexicon_of(model.tokenizer)
        self._model, self._max_tokens, self._device = model, max_tokens, device
        self._known = torch.empty(0, dtype=torch.int64, device=device)
        self._features: Tensor | None = None

    def know(self, captions: Captions, features: Tensor) -> None:
        """Do not encode what has been encoded already; before anything else is."""
        self._known, self._features = self.lexicon.fingerprints(captions.rows), features

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """See `Encode`. Of strings, none is kept."""
        if not isinstance(captions, Captions):
            return encode_captions(self._model, captions, self._max_tokens, self._device)
        prints = self.lexicon.fingerprints(captions.rows)
        distinct, kind = prints.unique(return_inverse=True)
        new = ~torch.isin(distinct, self._known)
        if new.any():
            one = torch.empty_like(distinct).index_copy_(0, kind, torch.arange(len(prints), device=self._device))
            rows = Captions(captions.rows[one[new]], self.lexicon)
            found = encode_captions(self._model, rows, self._max_tokens, self._device)
            self._features = found if self._features is None else torch.cat([self._features, found])
            self._known = torch.cat([self._known, distinct[new]])
        assert self._features is not None
        known, order = self._known.sort()
        return self._features[order[torch.searchsorted(known, distinct)]][kind]
