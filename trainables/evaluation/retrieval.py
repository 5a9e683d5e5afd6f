"""Ranks and galleries, pessimistic: ties and NaN count against the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from trainables.precision import inner_products

CELLS = {"cuda": 64_000_000, "cpu": 1_000_000}
"""Scores held at once, of COCO 40 images against 25,000 captions on a CPU; bounds memory, changes no result."""


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
        caption_groups: (captions,) equal for equal caption strings: they describe each other's images too. Papers
            count them as wrong; all different values give their numbers.

    Returns:
        Ranks: one plus the number of wrong answers that score at least as high as the best right one. Where a score
        involved is NaN, the rank is worse than any gallery.
    """
    one = np.ones(len(caption_image), dtype=bool)
    captions = np.arange(len(caption_image))
    groups = int(caption_groups.max()) + 1
    described = sparse.csr_array((one, (caption_image, caption_groups)), shape=(len(image_features), groups))
    right = described @ sparse.csr_array((one, (caption_groups, captions)))
    tr = best_ranks(image_features, text_features, right)
    return Ranks(tr, best_ranks(text_features, image_features, right.T.tocsr()), caption_image)


@torch.no_grad()
def best_ranks(queries: Tensor, gallery: Tensor, relevant: sparse.csr_array) -> np.ndarray:
    """(queries,) int64 ranks of each query's best right answer; see `retrieval_ranks` and `scored`."""
    # Small pieces between large ones would tear the heap apart.
    ranks = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    for chunk, scores, right in scored(queries, gallery, relevant):
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ahead = ((scores >= best) & ~right).sum(1)
        ranks[chunk] = 1 + ahead.masked_fill(scores.isnan().any(1), len(gallery))
    return ranks.cpu().numpy()


def scored(queries: Tensor, gallery: Tensor, relevant: sparse.csr_array) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few queries at a time: which ones, their scores (those queries, gallery), and which answers are right.

    Args:
        queries: (queries, dim).
        gallery: (gallery, dim).
        relevant: bool (queries, gallery), the right answers.
    """
    device, count = queries.device, len(gallery)
    rows = max(1, CELLS["cuda" if device.type == "cuda" else "cpu"] // count)
    query = np.repeat(np.arange(len(queries)), np.diff(relevant.indptr))
    cells = torch.from_numpy(query % rows * count + relevant.indices).to(device)  # of their chunk
    for start in range(0, len(queries), rows):
        chunk = slice(start, min(start + rows, len(queries)))
        right = torch.zeros(chunk.stop - start, count, dtype=torch.bool, device=device)
        right.view(-1).index_fill_(0, cells[relevant.indptr[start] : relevant.indptr[chunk.stop]], True)
        yield chunk, inner_products(queries[chunk], gallery), right


def restrict(
    caption_image: np.ndarray, images: np.ndarray, captions_per_image: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A smaller gallery: some images and their captions.

    Args:
        caption_image: (captions,) index of each caption's image.
        images: (kept,) indices of the images that stay, in their new order.
        captions_per_image: only the first so many of each image stay; COCO's protocols use 5, Flickr30k has 5.

    Returns:
        Rows of the captions that stay, image after image, and each one's place in `images`.

    Raises:
        ValueError: an image has fewer captions than wanted.
    """
    place = np.full(max(caption_image.max(), images.max()) + 1, -1)
    place[images] = np.arange(len(images))
    rows = np.flatnonzero(place[caption_image] >= 0)
    rows = rows[np.argsort(place[caption_image[rows]], kind="stable")]
    owner = place[caption_image[rows]]
    if captions_per_image is None:
        return rows, owner
    counts = np.bincount(owner, minlength=len(images))
    if counts.min() < captions_per_image:
        raise ValueError(
            f"image {images[counts.argmin()]} has {counts.min()} captions; {captions_per_image} are needed of each"
        )
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = nth < captions_per_image
    return rows[first], owner[first]


def fold_ranks(
    image_features: Tensor,
    text_features: Tensor,
    caption_image: np.ndarray,
    caption_groups: np.ndarray,
    *,
    fold_images: int = 1000,
    captions_per_image: int = 5,
) -> Ranks:
    """Ranks within consecutive blocks of images: "COCO 1K" are the five blocks of the 5,000 test images.

    All blocks have the same number of queries, so a recall over all of them is the mean over the blocks.

    Args:
        image_features: (images, dim), L2-normalised, in the order of Karpathy's split.
        text_features: (captions, dim), L2-normalised.
        caption_image: (captions,) index of each caption's image.
        caption_groups: see `retrieval_ranks`.
        fold_images: in a block.
        captions_per_image: that count, the first ones of each image.

    Raises:
        ValueError: the images make no whole number of blocks, or one has too few captions.
    """
    images = len(image_features)
    if images == 0 or images % fold_images:
        raise ValueError(f"{images} images make no whole number of blocks of {fold_images}")
    folds = []
    for block in np.split(np.arange(images), images // fold_images):
        rows, owner = restrict(caption_image, block, captions_per_image)
        ranks = retrieval_ranks(image_features[block], text_features[rows], owner, caption_groups[rows])
        folds.append(Ranks(ranks.tr, ranks.ir, block[owner]))
    return Ranks(
        np.concatenate([fold.tr for fold in folds]),
        np.concatenate([fold.ir for fold in folds]),
        np.concatenate([fold.caption_image for fold in folds]),
    )
