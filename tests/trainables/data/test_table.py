"""Annotation files are read and checked once, and again as soon as they hold something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from coco_set import SPLITS, captions_of, coco_document, dump, load, refused

from trainables.data import Dataset, table
from trainables.data.annotations import Picture
from trainables.data.table import Table

ODD = ["a\nb", "caf\u00e9 \U0001f600", "\ud800 alone", "nul \0", "x"]


def pictures() -> list[Picture]:
    captions = tuple(enumerate(ODD, 2**62))
    return [Picture(7, "a/b.jpg", captions[:3], None), Picture(2**62, "\u00e4.jpg", captions[3:], "test")]


def equal(one: Dataset, other: Dataset) -> bool:
    same = one.digest == other.digest
    for first, second in ((one.train, other.train), (one.evaluation, other.evaluation)):
        same &= first.captions == second.captions
        for name in ("image_ids", "caption_ids", "caption_image", "pixels"):
            same &= bool((getattr(first, name) == getattr(second, name)).all())
    return same


def test_a_table_holds_what_was_read() -> None:
    made = Table.of(pictures())
    assert made.owners.tolist() == [0, 0, 0, 1, 1]
    assert made.pictures() == [
        [picture.id, picture.file_name, [list(caption) for caption in picture.captions]] for picture in pictures()
    ]


def test_any_text_is_kept(tmp_path: Path) -> None:
    made = Table.of(pictures())
    table._save(tmp_path / "pairs.npz", made, Table.of([]))
    found = table._load(tmp_path / "pairs.npz")
    assert found is not None
    kept, empty = found
    assert (kept.names, kept.captions) == (made.names, made.captions)
    assert all((getattr(kept, name) == getattr(made, name)).all() for name in ("ids", "caption_ids", "owners"))
    assert (empty.names, empty.captions) == ([], [])


def test_files_are_checked_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(root)
    with monkeypatch.context() as patched:
        patched.setattr(table, "read_pictures", lambda *_: pytest.fail("read again"))
        assert equal(load(root), first)
    (kept,) = (root.parent / "cache").glob("pairs-*.npz")
    kept.write_bytes(kept.read_bytes()[:-100])
    assert equal(load(root), first), "what is damaged is made again"


@pytest.mark.parametrize("file", ["captions.json", "split.json", "generated.json"])
def test_files_with_another_content_are_read_again(root: Path, file: str) -> None:
    generated = root / "generated.json"
    dump(generated, [{"image_id": 7, "caption": "one more"}])
    before = load(root, generated_captions=generated)
    document: dict[str, Any] = {"annotations": coco_document()["annotations"][5:]}
    contents: dict[str, Any] = {
        "captions.json": {**coco_document(), "annotations": coco_document()["annotations"][::-1]},
        "split.json": {**SPLITS, "train": [7]},
        "generated.json": [{"image_id": 391895, "caption": "one more"}],
    }
    dump(root / file, contents[file])
    after = load(root, generated_captions=generated)
    assert after.train.captions != before.train.captions
    wrong = {
        "captions.json": {**coco_document(), **document, "images": [{"id": "a", "file_name": ""}]},
        "split.json": {**SPLITS, "test": [7]},
        "generated.json": [{"image_id": 1, "caption": "of no image"}],
    }
    dump(root / file, wrong[file])
    assert refused(root, generated_captions=generated)


def test_each_setting_that_chooses_pictures_has_its_own(root: Path) -> None:
    dump(root / "other.json", {"train": [7], "validation": [42], "test": [391895]})
    settings: list[dict[str, Any]] = [
        {"max_train_images": 1},
        {"split": "other.json"},
        {"split": "other.json", "val_split": "validation", "eval_split": "val"},
        {
            "split": "other.json",
            "train_splits": ("train", "test"),
            "val_split": "validation",
            "test_split": "later",
            "eval_split": "val",
        },
    ]
    whole = load(root)
    found = [load(root, **given) for given in settings]
    assert [(data.train.image_ids.tolist(), data.evaluation.image_ids.tolist()) for data in found] == [
        (whole.train.image_ids[:1].tolist(), [42]),
        ([7], [391895]),
        ([7], [42]),
        (whole.train.image_ids.tolist(), [42]),
    ]
    assert len({data.digest for data in found}) == len(settings)
    document = json.loads((root / "captions.json").read_text())
    document["annotations"] = [item for item in document["annotations"] if item["id"] != 420]
    dump(root / "captions.json", document)
    assert "eval_min_captions 5" in refused(root)
    assert load(root, eval_min_captions=4).evaluation.captions == captions_of(42)[1:]
    assert "eval_min_captions 5" in refused(root)


def test_the_digest_is_that_of_the_whole_json(root: Path) -> None:
    """It is found again by a hash of the same parts, so it changes with each of them."""
    digests = {load(root).digest, load(root, resize="stretch").digest}
    image = next((root / "images").iterdir())
    content = image.read_bytes()
    for ending in (b" ", b"x"):  # behind the picture, the second time as long as before
        image.write_bytes(content + ending)
        digests.add(load(root).digest)
    assert len(digests) == 4
    for path in (root.parent / "cache").glob("data-*"):
        path.unlink()
    assert load(root).digest in digests
