"""The pictures of a split as arrays, and how they are kept once annotation files were read and checked."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainables.config import DataConfig, content_hash
from trainables.data.annotations import Picture
from trainables.data.cache import locked
from trainables.data.coco import annotation_files, read_pictures, refuse_missing
from trainables.identity import file_digest

VERSION = 2
"""Of what is kept: raise it when the same annotation files would be read in another way."""

USED = {
    *("captions", "split", "train_splits", "val_split", "test_split", "val_share"),
    *("eval_split", "eval_min_captions", "max_train_images"),
}
"""Fields that decide, with the content of the annotation files, which pictures there are."""


@dataclass(frozen=True)
class Table:
    """Some pictures with all their captions; the captions of one picture follow each other.

    Attributes:
        ids: (pictures,) int64.
        names: (pictures,) of their files, below the image folder.
        captions: (captions,) texts.
        caption_ids: (captions,) int64.
        owners: (captions,) int64, position of the caption's picture.
    """

    ids: np.ndarray
    names: list[str]
    captions: list[str]
    caption_ids: np.ndarray
    owners: np.ndarray

    @classmethod
    def of(cls, pictures: Sequence[Picture]) -> Table:
        """From what `coco` and `shards` read."""
        captions = [caption for picture in pictures for caption in picture.captions]
        counts = [len(picture.captions) for picture in pictures]
        return cls(
            np.array([picture.id for picture in pictures], dtype=np.int64),
            [picture.file_name for picture in pictures],
            [text for _, text in captions],
            np.array([number for number, _ in captions], dtype=np.int64),
            np.repeat(np.arange(len(pictures)), counts),
        )

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of all it holds."""
        digest = hashlib.sha256()
        for array in self.arrays().values():
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def arrays(self) -> dict[str, np.ndarray]:
        """All it holds; texts as one in UTF-8, and the number of characters of each."""
        found = {}
        for name, value in vars(self).items():
            if isinstance(value, list):
                found[f"{name}_lengths"] = np.array(list(map(len, value)), dtype=np.int32)
                value = np.frombuffer("".join(value).encode("utf-8", "surrogatepass"), dtype=np.uint8)
            found[name] = value
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> Table:
        """What `arrays` gave, under names that begin with `prefix`."""

        def texts(name: str) -> list[str]:
            whole = arrays[prefix + name].tobytes().decode("utf-8", "surrogatepass")
            ends = np.cumsum(arrays[f"{prefix}{name}_lengths"], dtype=np.int64).tolist()
            return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]

        ids, caption_ids, owners = (arrays[prefix + name] for name in ("ids", "caption_ids", "owners"))
        return cls(ids, texts("names"), texts("captions"), caption_ids, owners)

    def pictures(self) -> list[list[object]]:
        """Plain values: (id, file name, ((caption id, text), ...)) by picture."""
        ends = np.searchsorted(self.owners, np.arange(len(self.ids)), side="right").tolist()
        captions = [[number, text] for number, text in zip(self.caption_ids.tolist(), self.captions, strict=True)]
        parts = [captions[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return [list(row) for row in zip(self.ids.tolist(), self.names, parts, strict=True)]


def read_tables(config: DataConfig, root: Path, cache_dir: Path) -> tuple[Table, Table]:
    """The training and the evaluation pictures of a data set without shards.

    They are read and checked once: where the annotation files hold what they held, so do the tables.

    Raises:
        DataError: see `coco.read_pictures`.
    """
    refuse_missing(config, root)
    path = _place(config, root, cache_dir)
    if path is None:
        return _read(config, root)  # which tells what is wrong
    with locked(path):
        found = _load(path)
        if found is None:
            found = _read(config, root)
            if path == _place(config, root, cache_dir):  # nobody wrote to the files meanwhile
                _save(path, *found)
    return found


def _read(config: DataConfig, root: Path) -> tuple[Table, Table]:
    train, test = read_pictures(config, root)
    return Table.of(train), Table.of(test)


def _place(config: DataConfig, root: Path, cache_dir: Path) -> Path | None:
    """Where they are kept, by the content of the annotation files; None where these cannot be read."""
    try:
        content = [(name, file_digest(path)) for name, path in annotation_files(config, root)]
    except OSError:
        return None
    fields = config.model_dump(mode="json", include=USED)
    return cache_dir / f"pairs-{content_hash({'version': VERSION, 'fields': fields, 'files': content})}.npz"


def _save(path: Path, train: Table, test: Table) -> None:
    """Write as .npz without pickles, all or nothing."""
    arrays: dict[str, Any] = {f"train_{name}": array for name, array in train.arrays().items()}
    arrays |= {f"test_{name}": array for name, array in test.arrays().items()}
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(path)


def _load(path: Path) -> tuple[Table, Table] | None:
    """What `_save` wrote; None if there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Table.from_arrays(arrays, "train_"), Table.from_arrays(arrays, "test_")
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
