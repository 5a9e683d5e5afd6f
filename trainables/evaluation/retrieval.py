"""Ranks and recall, pessimistic: ties and NaN count against the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """1 is best. `tr`: (images,), of the best own caption; `ir`: (captions,), of the own image."""

    tr: np.ndarray
    ir: np.ndarray
    caption_image: np.ndarray


@torch.no_grad()
def retrieval_ranks(
    image_features: Tensor, text_features: Tensor, caption_image: np.ndarray, caption_groups: np.ndarray
) -> Ranks:
    """Rank every query against the whole gallery.

    Args:
        image_features: (images, dim), L2-normalised.
        text_features: (captions, dim), L2-normalised.
        caption_image: (captions,) index of each caption's image; every image has one at least.
        caption_groups: (captions,) equal for equal caption strings: they describe each other's images too.

    Returns:
        Ranks: one plus the number of wrong answers that score at least as high as the best right one. Where a score
        involved is NaN, the rank is worse than any gallery.
    """
    device = image_features.device
    image_of = torch.as_tensor(caption_image, device=device)
    group_of = torch.as_tensor(caption_groups, device=device)
    groups = int(group_of.max()) + 1
    describes = torch.zeros(len(image_features), groups, dtype=torch.bool, device=device)
    describes[image_of, group_of] = True
    tr, ir = [], []
    for rows in torch.arange(len(image_features), device=device).split(256):
        tr.append(_ranks(image_features[rows] @ text_features.T, describes[rows][:, group_of]))
    for rows in torch.arange(len(text_features), device=device).split(2048):
        ir.append(_ranks(text_features[rows] @ image_features.T, describes[:, group_of[rows]].T))
    return Ranks(torch.cat(tr).cpu().numpy(), torch.cat(ir).cpu().numpy(), caption_image)


def _ranks(scores: Tensor, right: Tensor) -> Tensor:
    """(queries, gallery) scores and which answers are right -> (queries,) int64 ranks."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    ranks = 1 + ((scores >= best) & ~right).sum(1)
    broken = scores.isnan().any(1)
    return torch.where(broken, scores.shape[1] + 1, ranks)
