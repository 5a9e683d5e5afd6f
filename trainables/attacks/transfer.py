"""Examples made on another model, for victims that hide their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.apgd import apgd
from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.encoding import encode_captions
from trainables.attacks.search import TextSearch
from trainables.models import RetrievalModel
from trainables.models.loading import load
from trainables.precision import attackable


@dataclass(frozen=True)
class Transfer(Attack):
    """APGD on the images' similarity to their captions in another model, then `TextSearch` on the victim itself.

    No gradient of the victim is asked for. The base model, or a recipe's, is close enough for its examples to transfer.

    Attributes:
        model: a model's folder or hub id, which is attacked in the victim's place.
        epsilon: radius.
        steps: of APGD.
        words: changed per caption.
        candidates: substitutes tried per word.
    """

    model: str
    changes = frozenset({"image", "text"})
    epsilon: float = 2 / 255
    steps: int = 10
    words: int = 1
    candidates: int = 10

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`.

        Raises:
            InputError: the other model cannot be loaded.
        """
        other, device = _loaded(self.model).to(batch.pixels.device), batch.pixels.device
        with attackable(other, device):
            captions = encode_captions(other, list(batch.captions()), other.max_tokens, device)
            sums = captions.new_zeros(len(batch.pixels), captions.shape[1]).index_add(0, batch.owner, captions)

            def unlike(pixels: Tensor, _: int) -> Tensor:
                return -(F.normalize(other.encode_image(pixels).float(), dim=-1) * sums).sum(1)

            pixels, _ = apgd(batch.pixels, unlike, batch.pixels, epsilon=self.epsilon, steps=self.steps)
        with torch.no_grad():
            features = victim.encode_image(pixels)
        search = TextSearch(words=self.words, candidates=self.candidates)
        return Attacked(pixels, search.captions(victim, batch, features))


@lru_cache(maxsize=4)
def _loaded(name: str) -> RetrievalModel:
    return load(name)
