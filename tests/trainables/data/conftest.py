"""Data sets that several files of tests read."""

from __future__ import annotations

from pathlib import Path

import pytest
from coco_set import SPLITS, coco_document, dump, write_images


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images, five captions each, in COCO format."""
    write_images(tmp_path / "set")
    dump(tmp_path / "set" / "captions.json", coco_document())
    dump(tmp_path / "set" / "split.json", SPLITS)
    return tmp_path / "set"
