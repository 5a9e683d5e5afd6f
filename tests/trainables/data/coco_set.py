"""A small data set in COCO format, and what it is refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainables.config import TEST, DataConfig
from trainables.data import DataError, Dataset, load_dataset

NAMES = {
    391895: "COCO_val2014_000000391895.jpg",
    42: "000000000042.jpg",
    7: "COCO_train2014_000000000007.jpg",
}
SPLITS = {"train": [391895, 7], "test": [42]}


def dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def captions_of(image_id: int) -> list[str]:
    return [f"caption {k} of image {image_id}" for k in range(5)]


def coco_document() -> dict[str, list[Any]]:
    return {
        "images": [{"id": image_id, "file_name": name} for image_id, name in NAMES.items()],
        "annotations": [
            {"id": image_id * 10 + k, "image_id": image_id, "caption": text}
            for image_id in reversed(NAMES)
            for k, text in enumerate(captions_of(image_id))
        ],
    }


def write_images(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    for position, name in enumerate(NAMES.values()):
        Image.new("RGB", (24, 16), (80 * position, 10, 200)).save(root / "images" / name)


def load(root: Path, **settings: Any) -> Dataset:
    config = DataConfig(root=root, image_pixels=16, **{"eval_split": TEST, **settings})
    return load_dataset(config, root.parent / "cache")


def refused(root: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(root, **settings)
    return str(caught.value)


def train_rows(ids: list[int]) -> list[dict[str, Any]]:
    return [
        {"image": NAMES[image_id], "caption": text, "image_id": f"coco_{image_id}"}
        for image_id in ids
        for text in captions_of(image_id)
    ]
