"""COCO test retrieval with the right answers COCO left out: CxC and ECCV Caption.

COCO counts a fitting caption as wrong if it was written for another image. Crisscrossed Captions (Parekh et al. 2021)
and ECCV Caption (Chun et al. 2022) had people judge such pairs. Both give lists of ids, which are read from files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from trainables.evaluation.retrieval import best_ranks, scored

FILES = {"tr": "{}_image_to_caption.json", "ir": "{}_caption_to_image.json"}
"""Ids of the right answers by id of the query, `{"id": [id, ...]}`, as github.com/naver-ai/eccv-caption has them."""


def extended_metrics(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: np.ndarray,
    caption_ids: np.ndarray,
    folder: Path,
    recall_at: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """Retrieval measured by three ground truths, pessimistic: ties and NaN count against the model.

    Only images and captions the ground truths know are used: 5,000 and 25,000 of the COCO test split, which has ten
    captions more. With fewer images, answers and queries that are not there are left out, and the numbers are not those
    of papers.

    Args:
        image_features: (images, dim), L2-normalised.
        text_features: (captions, dim), L2-normalised.
        image_ids: (images,) COCO's.
        caption_ids: (captions,) COCO's annotation ids.
        folder: with the six files (`original`, `cxc` and `eccv`, see `FILES`).
        recall_at: the k of R@k.

    Returns:
        In [0, 1]: `coco/tr_r1`, `cxc/ir_r5` and so on; `eccv/tr_r1`, `eccv/tr_r_precision` and `eccv/tr_map_at_r`,
        and the same for `ir`.

    Raises:
        ValueError: a ground truth has none of the images or captions.
    """
    known = {direction: _read(folder, "original", direction) for direction in FILES}
    ids, features = {}, {}
    for direction, own_ids, own_features in (("tr", image_ids, image_features), ("ir", caption_ids, text_features)):
        kept = np.flatnonzero(np.isin(own_ids, list(known[direction])))
        ids[direction], features[direction] = own_ids[kept], own_features[kept]
    found = {}
    for direction, other in (("tr", "ir"), ("ir", "tr")):
        gallery = features[other]
        for name in ("original", "cxc", "eccv"):
            truth = _read(folder, name, direction)
            queries, relevant = _relevant(truth, ids[direction], ids[other])
            if not len(queries):
                raise ValueError(f"no query of {folder / FILES[direction].format(name)} is in the gallery")
            asked = features[direction][queries]
            prefix = f"{'coco' if name == 'original' else name}/{direction}"
            if name == "eccv":
                # Two answers are captions outside the 25,000. The authors count them as not found, and so do we.
                outside = [sum(a not in known[other] for a in truth[query]) for query in ids[direction][queries]]
                answers = relevant.sum(1) + outside
                places = answer_places(asked, gallery, relevant, int(answers.max()))
                found.update({f"{prefix}_{measure}": value for measure, value in precision(places, answers).items()})
            else:
                ranks = best_ranks(asked, gallery, relevant)
                found.update({f"{prefix}_r{k}": float((ranks <= k).mean()) for k in recall_at})
    return found


def precision(places: list[np.ndarray], answers: np.ndarray) -> dict[str, float]:
    """R@1, R-Precision and mAP@R (Musgrave et al. 2020, section 4.1): what ECCV Caption is measured by.

    Args:
        places: for each query those of its right answers, rising; see `answer_places`.
        answers: (queries,) R, the number of right answers. Those without a place are not found.

    Returns:
        Means over the queries, in [0, 1], of whether an answer is first; of the share of answers among the first R; and
        of the sum over those of their precision, that is (answers up to there) / (place), divided by R.
    """
    first, share, average = [], [], []
    for own, count in zip(places, answers, strict=True):
        within = own <= count
        first.append(own[0] == 1)
        share.append(within.sum() / count)
        average.append((np.arange(1, len(own) + 1) / own * within).sum() / count)
    return {"r1": float(np.mean(first)), "r_precision": float(np.mean(share)), "map_at_r": float(np.mean(average))}


@torch.no_grad()
def answer_places(queries: Tensor, gallery: Tensor, relevant: sparse.csr_array, depth: int) -> list[np.ndarray]:
    """Where each query's right answers stand, from 1, rising.

    A wrong answer that scores the same as a right one stands before it. A query with a NaN finds nothing.

    Args:
        queries: (queries, dim).
        gallery: (gallery, dim).
        relevant: bool (queries, gallery), at least one a query.
        depth: places are exact up to here; those beyond are only known to be beyond. At least 1.
    """
    places: list[np.ndarray] = []
    for chunk, scores, right in scored(queries, gallery, relevant):
        counts = np.diff(relevant.indptr)[chunk]
        most = int(counts.max())
        best_right = scores.masked_fill(~right, -torch.inf).topk(most).values
        best_wrong = scores.masked_fill(right, -torch.inf).topk(min(depth, len(gallery))).values
        ahead = (best_wrong[:, None, :] >= best_right[:, :, None]).sum(2)
        ahead[scores.isnan().any(1)] = max(depth, len(gallery))
        found = (1 + torch.arange(most, device=ahead.device) + ahead).cpu().numpy()
        places += [row[:count] for row, count in zip(found, counts.tolist(), strict=True)]
    return places


def _read(folder: Path, name: str, direction: str) -> dict[int, list[int]]:
    found = json.loads((folder / FILES[direction].format(name)).read_text(encoding="utf-8"))
    return {int(query): answers for query, answers in found.items()}


def _relevant(
    truth: dict[int, list[int]], query_ids: np.ndarray, gallery_ids: np.ndarray
) -> tuple[np.ndarray, sparse.csr_array]:
    """Rows of the queries that have an answer in the gallery, and bool (those queries, gallery)."""
    place = {int(answer): column for column, answer in enumerate(gallery_ids)}
    answers = [[place[a] for a in truth.get(int(query), ()) if a in place] for query in query_ids]
    queries = np.array([row for row, own in enumerate(answers) if own], dtype=np.int64)
    rows = np.repeat(np.arange(len(queries)), [len(answers[query]) for query in queries])
    columns = np.concatenate([answers[query] for query in queries]) if len(queries) else np.zeros(0, np.int64)
    shape = (len(queries), len(gallery_ids))
    return queries, sparse.csr_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=shape)
