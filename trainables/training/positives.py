"""Which captions of a batch describe which images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Positives:
    """A caption describes an image that has it, or has another of the same words, whether that was drawn or not.

    Args:
        caption_image: (captions,) each one's image, of all captions that are drawn from.
        caption_groups: (captions,) equal for equal words.
        device: where it is asked.
    """

    def __init__(self, caption_image: np.ndarray, caption_groups: np.ndarray, device: torch.device) -> None:
        self._kinds = int(caption_groups.max()) + 1
        pairs = np.unique(caption_image.astype(np.int64) * self._kinds + caption_groups)
        self._pairs, self._groups = torch.from_numpy(pairs).to(device), torch.from_numpy(caption_groups).to(device)

    def __call__(self, images: Tensor, captions: Tensor) -> Tensor:
        """Bool (images, captions).

        Args:
            images: int64 (images,), their numbers in `caption_image`.
            captions: int64 (captions,), rows of it.
        """
        asked = images[:, None] * self._kinds + self._groups[captions]
        place = torch.searchsorted(self._pairs, asked).clamp_(max=len(self._pairs) - 1)
        return self._pairs[place] == asked
