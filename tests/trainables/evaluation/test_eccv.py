"""Extended ground truths: by hand, and against the package of ECCV Caption's authors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.nn import functional as F

from trainables.evaluation.eccv import answer_places, extended_metrics, precision


def test_places_and_precision_by_hand() -> None:
    gallery = torch.tensor([[5.0], [4.0], [4.0], [2.0], [1.0]])
    relevant = sparse.csr_array(np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=bool))
    places = answer_places(torch.ones(2, 1), gallery, relevant, 2)
    # The right 4 stands behind 5 and the wrong 4, the 2 somewhere beyond the depth.
    assert places[0][0] == 3
    assert places[0][1] > 2
    assert places[1].tolist() == [1]
    got = precision([np.array([1, 3, 9]), np.array([2])], np.array([3, 2]))
    assert got["r1"] == 1 / 2
    assert got["r_precision"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert got["map_at_r"] == pytest.approx(((1 + 2 / 3) / 3 + (1 / 2) / 2) / 2)
    nothing = answer_places(torch.tensor([[float("nan")], [1.0]]), gallery, relevant, 2)
    assert precision(nothing[:1], np.array([2])) == {"r1": 0.0, "r_precision": 0.0, "map_at_r": 0.0}
    assert nothing[1].tolist() == [1]
    collapsed = answer_places(torch.zeros(2, 1), gallery, relevant, 2)
    assert precision(collapsed, np.array([2, 1]))["map_at_r"] == 0


def test_equals_the_authors_package_on_coco(real_data: Path) -> None:
    """All 5,000 images and 25,000 captions, with features that retrieve neither all nor nothing."""
    folder = real_data / "eccv_caption"
    caption_ids = np.load(folder / "coco_test_ids.npy")
    owners = json.loads((folder / "original_caption_to_image.json").read_text())
    image_of = np.array([owners[str(c)][0] for c in caption_ids])
    image_ids = image_of[::5]
    owner = np.repeat(np.arange(5000), 5)
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, 24, generator=generator, dtype=torch.float64)

    images = F.normalize(normal(5000), dim=-1)
    texts = F.normalize(images[owner] + 0.2 * normal(25000), dim=-1)

    # The COCO test split has ten more captions, which must not count.
    mine = extended_metrics(
        images, torch.cat([texts, images[:10]]), image_ids, np.append(caption_ids, -1 - np.arange(10)), folder
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from eccv_caption import Metrics
    theirs = Metrics()

    def nearest(queries: torch.Tensor, query_ids: np.ndarray, gallery: torch.Tensor, ids: np.ndarray) -> dict[int, Any]:
        best = torch.cat([(rows @ gallery.T).topk(50).indices for rows in queries.split(500)])
        return dict(zip(query_ids.tolist(), ids[best.numpy()].tolist(), strict=True))

    retrieved = {
        "i2t": nearest(images, image_ids, texts, caption_ids),
        "t2i": nearest(texts, caption_ids, images, image_ids),
    }
    for k in (1, 5, 10):
        for name, got in (("coco", theirs.coco_5k_recalls), ("cxc", theirs.cxc_recalls)):
            expected = got(retrieved, "all", K=k)
            assert mine[f"{name}/tr_r{k}"] == pytest.approx(expected["i2t"], abs=1e-9)
            assert mine[f"{name}/ir_r{k}"] == pytest.approx(expected["t2i"], abs=1e-9)
    expected = theirs.eccv_metrics(retrieved, "all")
    for measure in ("r1", "rprecision", "map_at_r"):
        own = measure.replace("rprecision", "r_precision")
        assert mine[f"eccv/tr_{own}"] == pytest.approx(expected[f"eccv_{measure}"]["i2t"], abs=1e-9)
        assert mine[f"eccv/ir_{own}"] == pytest.approx(expected[f"eccv_{measure}"]["t2i"], abs=1e-9)
        assert 0.02 < mine[f"eccv/tr_{own}"] < 0.98


def test_a_gallery_without_any_query_is_told(tmp_path: Path) -> None:
    for name in ("original", "cxc", "eccv"):
        known = {"1": [11, 12], "2": [21]} if name == "original" else {"2": [21]}
        backward = {str(caption): [int(image)] for image, captions in known.items() for caption in captions}
        (tmp_path / f"{name}_image_to_caption.json").write_text(json.dumps(known))
        (tmp_path / f"{name}_caption_to_image.json").write_text(json.dumps(backward))
    images, texts = torch.eye(3), torch.eye(3)[[0, 1, 1, 2]]
    captions = np.array([11, 12, 21, 99])
    found = extended_metrics(images, texts, np.array([1, 2, 3]), captions, tmp_path, recall_at=(1, 2))
    assert found["coco/tr_r1"] == 1 / 2  # caption 12 looks like image 2 and ties with 21; image 3 and 99 are unknown
    assert found["coco/ir_r1"] == 2 / 3
    assert found["cxc/tr_r1"] == 0
    assert found["eccv/ir_map_at_r"] == 1
    with pytest.raises(ValueError, match=r"no query of .*cxc_image_to_caption\.json"):
        extended_metrics(images[:1], texts[:2], np.array([1]), captions[:2], tmp_path)
