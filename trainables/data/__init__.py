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
from trainables.data.annotations import Picture
from trainables.data.coco import read_pictures, refuse_leaks
from trainables.data.errors import DataError
from trainables.data.shards import read_shards
from trainables.data.table import Table, read_tables

__all__ = ["DataError", "Dataset", "Split", "load_dataset", "read_pairs"]

LAYOUT = (
    *("images", "captions", "split", "linked_folders", "train_splits", "val_split", "test_split"),
    "eval_min_captions",
)
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
        digest: Hash of the ids, captions, image files (name and content) and settings that shape the split; the same
            on every machine.
    """

    image_ids: np.ndarray
    captions: list[str]
    caption_ids: np.ndarray
    caption_image: np.ndarray
    pixels: np.ndarray
    digest: str = ""


@dataclass(frozen=True)
class Dataset:
    """What is trained on and what is measured, with no image in both.

    Attributes:
        train: Images of the training splits, in the order of the captions file.
        evaluation: Images of the split that is measured (`data.eval_split`) that have enough captions.
    """

    train: Split
    evaluation: Split

    @property
    def digest(self) -> str:
        """Of both."""
        return content_hash({"train": self.train.digest, "evaluation": self.evaluation.digest})


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
    if config.shards is None:
        train, evaluation = read_tables(config, root, cache_dir)
        inside: list[cache.ImageFile] = []
    else:
        trained, evaluated, inside = read_pairs(config, root)
        train, evaluation = Table.of(trained), Table.of(evaluated)
    beside = evaluation.names if inside else [*train.names, *evaluation.names]
    files = [*inside, *cache.locate(root / config.images, beside, config.linked_folders)]
    first = len(train.ids)
    return Dataset(
        _split(config, train, files[:first], cache_dir), _split(config, evaluation, files[first:], cache_dir)
    )


def read_pairs(config: DataConfig, root: Path) -> tuple[list[Picture], list[Picture], list[cache.ImageFile]]:
    """The training pictures, those that are measured, and where those of the training are if they are in shards.

    Raises:
        DataError: see `load_dataset`.
    """
    train, evaluated = read_pictures(config, root)
    if config.shards is None:
        return train, evaluated, []
    train, inside = read_shards(root, config.shards, 1 + max(picture.id for picture in evaluated))
    refuse_leaks({f"data.shards {config.shards!r}": train, f"data.{config.eval_split}_split": evaluated})
    return train[: config.max_train_images], evaluated, inside[: config.max_train_images]


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


def _split(config: DataConfig, table: Table, files: Sequence[cache.ImageFile], cache_dir: Path) -> Split:
    digest = _digest(config, table, files, cache_dir)
    pixels = cache.load_pixels(files, config.image_pixels, config.resize, cache_dir / f"images-{digest}.npy")
    return Split(table.ids, table.captions, table.caption_ids, table.owners, pixels, digest)


def _digest(config: DataConfig, table: Table, files: Sequence[cache.ImageFile], cache_dir: Path) -> str:
    """See `Split`; its long JSON is written once for what is the same in all that it holds."""
    sizes = [file.size for file in files]
    settings = {
        "versions": [cache.VERSION, shapes.VERSION if config.root is None else None],
        "content": cache.content_digest(files, cache_dir),
        "image_pixels": config.image_pixels,
        "resize": config.resize,
    }

    def whole() -> str:
        pictures = [
            [number, name, size, captions]
            for (number, name, captions), size in zip(table.pictures(), sizes, strict=True)
        ]
        return content_hash({**settings, "pictures": pictures})

    same = content_hash({**settings, "table": table.digest(), "sizes": sizes})
    return cache.remembered(cache_dir / f"data-{same}", whole)
