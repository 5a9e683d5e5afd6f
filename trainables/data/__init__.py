"""Image-caption pairs: a `DataConfig` goes in, checked captions and memory-mapped pixels come out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainables.config import DataConfig, ShapesConfig, content_hash
from trainables.data import cache, shapes
from trainables.data.coco import Picture, read_pictures, refuse_leaks
from trainables.data.errors import DataError
from trainables.data.shards import read_shards

__all__ = ["DataError", "Dataset", "Split", "load_dataset", "read_pairs"]

LAYOUT = ("images", "captions", "split", "linked_folders", "train_splits", "eval_split", "eval_min_captions")
"""Fields that describe the files of a root. The embedded shapes are written in the default layout."""


@dataclass(frozen=True)
class Split:
    """Some images with all their captions; the captions of one image follow each other.

    Attributes:
        image_ids: (images,) int64.
        captions: (captions,) the texts as they are in the file.
        caption_ids: (captions,) int64.
        caption_image: (captions,) int64, position of the caption's image.
        pixels: (images, 3, height, width) uint8, a read-only memory map. Pickling copies it: send other
            processes the config, and load there.
    """

    image_ids: np.ndarray
    captions: list[str]
    caption_ids: np.ndarray
    caption_image: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """What is trained on and what is evaluated, with no image in both.

    Attributes:
        train: Images of the training splits, in the order of the captions file.
        test: Images of the evaluation split that have enough captions.
        digest: Hash of the ids, captions, image files (name and content) and settings that shape the two
            splits; the same on every machine.
    """

    train: Split
    test: Split
    digest: str


def load_dataset(config: DataConfig, cache_dir: Path) -> Dataset:
    """Read and check a data set; images are decoded only the first time.

    Args:
        config: Where the data is and what of it is used; without a root, the embedded shapes.
        cache_dir: Folder for decoded images, shared by all processes of a node.

    Raises:
        DataError: If the data cannot be used, with everything that is wrong in one message.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    root = config.root
    if root is None:
        described = [
            name
            for name in LAYOUT
            if getattr(config, name) != DataConfig.model_fields[name].default
            and (name, config.split) != ("split", "split.json")  # the default of earlier studies
        ]
        if described:
            raise DataError(
                f"data.{', data.'.join(described)}: given, but data.root does not say where that data set is; give "
                "data.root, or leave out what describes it for the embedded shapes"
            )
        root = _shapes_root(config.shapes, cache_dir)
    train, test, files = read_pairs(config, root)
    digest = _digest(config, train, test, files, cache.content_digest(files, cache_dir))
    pixels = cache.load_pixels(files, config.image_pixels, config.resize, cache_dir / f"images-{digest}.npy")
    return Dataset(_split(train, pixels[: len(train)]), _split(test, pixels[len(train) :]), digest)


def read_pairs(config: DataConfig, root: Path) -> tuple[list[Picture], list[Picture], list[cache.ImageFile]]:
    """The training pictures, the evaluation pictures, and where the images of both are, in this order.

    Raises:
        DataError: see `load_dataset`.
    """
    train, test = read_pictures(config, root)
    inside: list[cache.ImageFile] = []
    if config.shards is not None:
        train, inside = read_shards(root, config.shards, 1 + max(picture.id for picture in test))
        refuse_leaks(train, test, config)
        train, inside = train[: config.max_train_images], inside[: config.max_train_images]
    beside = test if inside else [*train, *test]
    names = [picture.file_name for picture in beside]
    return train, test, [*inside, *cache.locate(root / config.images, names, config.linked_folders)]


def _shapes_root(config: ShapesConfig, cache_dir: Path) -> Path:
    """The embedded data set, written once: the folder appears whole or not at all."""
    name = f"shapes-{content_hash({'version': shapes.VERSION, **config.model_dump()})}"
    root = cache_dir / name
    if not root.is_dir():
        with cache.locked(root):
            if not root.is_dir():
                temporary = cache_dir / f"{name}.tmp"
                shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
                shapes.write(temporary, config)
                os.replace(temporary, root)
    return root


def _digest(
    config: DataConfig,
    train: Sequence[Picture],
    test: Sequence[Picture],
    files: Sequence[cache.ImageFile],
    content: str,
) -> str:
    pictures = [
        [picture.id, picture.file_name, file.size, picture.captions]
        for picture, file in zip((*train, *test), files, strict=True)
    ]
    return content_hash(
        {
            "versions": [cache.VERSION, shapes.VERSION if config.root is None else None],
            "content": content,
            "image_pixels": config.image_pixels,
            "resize": config.resize,
            "train": pictures[: len(train)],
            "test": pictures[len(train) :],
        }
    )


def _split(pictures: Sequence[Picture], pixels: np.ndarray) -> Split:
    captions = [
        (position, caption_id, text)
        for position, picture in enumerate(pictures)
        for caption_id, text in picture.captions
    ]
    return Split(
        image_ids=np.array([picture.id for picture in pictures], dtype=np.int64),
        captions=[text for _, _, text in captions],
        caption_ids=np.array([caption_id for _, caption_id, _ in captions], dtype=np.int64),
        caption_image=np.array([position for position, _, _ in captions], dtype=np.int64),
        pixels=pixels,
    )
