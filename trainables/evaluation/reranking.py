"""Ranks after image-text matching: the first candidates by similarity, put in a new order by the fusion transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.lexicon import Captions
from trainables.evaluation.batching import batches
from trainables.evaluation.retrieval import Ranks
from trainables.models import FusionModel, tokenize
from trainables.precision import inner_products

PAIRS = {"cuda": 2048, "cpu": 128}
"""Scored at once: many fill a GPU, few stay in a processor's cache. Changes no result."""

TEXTS = 512
"""Captions encoded at once; bounds memory, changes no result."""


def compact(image_tokens: Tensor) -> Tensor:
    """In the precision that is computed in: half as large under autocast, otherwise as they are."""
    device = image_tokens.device.type
    return image_tokens.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else image_tokens


@torch.no_grad()
def reranked(
    model: FusionModel,
    by_similarity: Ranks,
    image_tokens: Iterable[Tensor],
    image_features: Tensor,
    captions: Sequence[str],
    text_features: Tensor,
    caption_groups: np.ndarray,
    *,
    candidates: int,
    max_tokens: int,
    own_images: np.ndarray | None = None,
    beat: Callable[[], object] = lambda: None,
) -> Ranks:
    """Rank every query's first candidates by similarity anew, by their matching score (Li et al. 2021, section 4).

    Args:
        model: in eval mode.
        by_similarity: ranks by the same features, see `retrieval_ranks`.
        image_tokens: chunks (any number, image tokens, width) of the own images, in order, on any device.
        image_features: (images, dim), L2-normalised.
        captions: (captions,) texts; if they are numbers, on the host.
        text_features: (captions, dim), L2-normalised.
        caption_groups: (captions,) equal for equal caption strings.
        candidates: of each query; the publications take 128 on Flickr30k and 256 on COCO.
        max_tokens: where captions are cut.
        own_images: int (own images,), rising, this worker's share; every image if not given.
        beat: called now and then.

    Returns:
        Ranks: pessimistic, as by similarity. Behind the candidates the order by similarity goes on. Where a
        candidate's score is NaN, the rank is worse than any gallery.
    """
    images, texts = len(image_features), len(captions)
    image_of, group_of = torch.from_numpy(by_similarity.caption_image), torch.from_numpy(caption_groups)
    describes = torch.zeros(images, int(group_of.max()) + 1, dtype=torch.bool)
    describes[image_of, group_of] = True
    right = describes[:, group_of]
    of_images = _candidates(image_features, text_features, candidates)
    of_captions = _candidates(text_features, image_features, candidates)
    to_text, to_image = candidate_scores(
        model,
        image_tokens,
        image_features,
        captions,
        text_features,
        of_images,
        of_captions,
        max_tokens=max_tokens,
        own_images=own_images,
        beat=beat,
    )
    tr = _ranks(to_text, right.gather(1, of_images), by_similarity.tr, texts)
    ir = _ranks(to_image, right.T.gather(1, of_captions), by_similarity.ir, images)
    return Ranks(tr, ir, by_similarity.caption_image)


@torch.no_grad()
def candidate_scores(
    model: FusionModel,
    image_tokens: Iterable[Tensor],
    image_features: Tensor,
    captions: Sequence[str],
    text_features: Tensor,
    of_images: Tensor,
    of_captions: Tensor,
    *,
    max_tokens: int,
    own_images: np.ndarray | None = None,
    beat: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """The scores that candidates are ranked by.

    The published loop takes one query at a time, both ways, and computes an image's keys and values again for each of
    its captions. The score of a pair is the same both ways, so here the pairs of both are put together and scored
    by groups of images: an image's tokens are read once, its keys and values computed once for all its captions (for
    each `PAIRS` of them, if there are more), and captions are as long as they are.

    Args:
        of_images: int64 (images, candidates), captions.
        of_captions: int64 (captions, candidates), images.
        (others): see `reranked`.

    Returns:
        float32 like `of_images` and like `of_captions`, on the CPU.
    """
    images, texts, device = len(of_images), len(of_captions), image_features.device
    if isinstance(captions, Captions):
        tokens, mask = captions.lexicon.tokens(captions.rows, max_tokens)
    else:
        tokens, mask = tokenize(model, captions, max_tokens)
    by_length = mask.sum(1).argsort(stable=True)
    place = by_length.argsort()  # Captions go by length, so that those scored together need little padding.
    both_ways = [torch.arange(images)[:, None] * texts + place[of_images], of_captions * texts + place[:, None]]
    pairs, position = torch.cat([keys.flatten() for keys in both_ways]).unique(return_inverse=True)

    tokens, mask, text_features = tokens[by_length], mask[by_length], text_features[by_length.to(device)]
    lengths, text_tokens, mask = mask.sum(1).numpy(), _text_tokens(model, tokens, mask, device), mask.to(device)
    keys, left = pairs.numpy(), np.arange(images) if own_images is None else own_images
    size, scores = PAIRS["cuda" if device.type == "cuda" else "cpu"], torch.zeros(len(pairs), device=device)

    def score(seen: Tensor, labels: np.ndarray, group: np.ndarray, rows: np.ndarray, some: np.ndarray) -> Tensor:
        longest = int(lengths[rows[some]].max())
        where, image, caption = (
            torch.from_numpy(part).to(device) for part in (group[some], labels[group[some]], rows[some])
        )
        read = caption.flatten()
        logits = model.itm_logits(seen[where], text_tokens[read, :longest], mask[read, :longest])[:, 1].float()
        similarity = (text_features[caption] * image_features[image, None]).sum(2)  # no product that autocast rounds
        return logits.view_as(caption) + model.similarity_weight * similarity

    for chunk in image_tokens:
        seen, (labels, left) = chunk.to(device), np.split(left, [len(chunk)])
        starts, ends = (np.searchsorted(keys, image * texts) for image in (labels, labels + 1))
        for group, places in _groups(starts, ends, size):
            rows = keys[places] - labels[group, None] * texts

            found = batches(np.arange(len(group)), len(group), partial(score, seen, labels, group, rows))
            scores[torch.from_numpy(places).to(device)] = torch.cat(list(found))
            beat()
    if dist.is_initialized():
        dist.all_reduce(scores)
    both = scores.cpu()[position].split([of_images.numel(), of_captions.numel()])
    return both[0].view_as(of_images), both[1].view_as(of_captions)


def _groups(starts: np.ndarray, ends: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What is scored in one call: images (group,), and the places (group, width) of each one's pairs.

    Images with about as many pairs go together. Where one has fewer than others of its group, its last is there again.

    Args:
        starts: (images,) where each image's pairs begin.
        ends: where they end.
        size: of places in a call, at most.
    """
    counts = ends - starts
    order = (-counts).argsort(kind="stable")[: np.count_nonzero(counts)]
    while len(order):
        most = counts[order[0]]
        width = -(-most // -(-most // size))
        group, order = np.split(order, [size // width])
        for first in range(0, most, width):
            some = group[counts[group] > first]
            yield some, np.minimum(starts[some, None] + first + np.arange(width), ends[some, None] - 1)


def _candidates(queries: Tensor, gallery: Tensor, count: int) -> Tensor:
    """The most similar answers, int64 (queries, count) on the CPU."""
    count = min(count, len(gallery))
    return torch.cat([inner_products(rows, gallery).topk(count).indices.cpu() for rows in queries.split(256)])


def _text_tokens(model: FusionModel, tokens: Tensor, mask: Tensor, device: torch.device) -> Tensor:
    """Where the fusion begins, (captions, length, width), of captions in order of length."""
    parts = []
    for some, seen in zip(tokens.split(TEXTS), mask.split(TEXTS), strict=True):
        longest = int(seen[-1].sum())
        part = compact(model.text_tokens(some[:, :longest].to(device), seen[:, :longest].to(device)))
        parts.append(F.pad(part, (0, 0, 0, tokens.shape[1] - longest)))
    return torch.cat(parts)


def _ranks(scores: Tensor, right: Tensor, by_similarity: np.ndarray, gallery: int) -> np.ndarray:
    """(queries, candidates) scores and which are right -> (queries,).

    The rank by similarity stays where no right answer is safely among the candidates: that rank tells, ties counted
    against the model. Where a score is NaN, the rank is worse than any gallery.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    ranks = 1 + ((scores >= best) & ~right).sum(1)
    ranks = torch.where(torch.from_numpy(by_similarity <= scores.shape[1]), ranks, torch.from_numpy(by_similarity))
    return torch.where(scores.isnan().any(1), gallery + 1, ranks).numpy()
