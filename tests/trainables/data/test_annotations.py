"""Every mistake in captions and split files is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from coco_set import coco_document, dump, refused


def test_every_mistake_of_a_captions_file(root: Path) -> None:
    document = coco_document()
    document["images"] += [
        {"id": 7, "file_name": "again.jpg"},
        {"id": "8", "file_name": "x.jpg"},
        {"id": 9},
        "ten",
    ]
    document["annotations"] += [
        {"id": 1, "image_id": 555, "caption": "whose?"},
        {"id": 2, "image_id": 7, "caption": None},
        {"id": 3, "image_id": 7, "caption": " "},
        {"id": 70, "image_id": 7, "caption": "again"},
        {"image_id": 7, "caption": "no id"},
        {"id": 4, "caption": "no image"},
        [],
    ]
    dump(root / "captions.json", document)
    message = refused(root)
    for problem in (
        "image 7: id used 2 times",
        "images[4]: id '8' is no integer",
        "image 9: file_name None",
        "images[6]: 'ten' is no object",
        "annotation 1: image_id 555",
        "annotation 2: caption None",
        "annotation 3: caption ' '",
        "annotation 70: id used 2 times",
        "annotations[19]: id None",
        "annotation 4: image_id None",
        "annotations[21]: [] is no object",
    ):
        assert problem in message
    assert "captions.json has 11 unusable entries" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"images": [', "no valid JSON"),
        ('{"images": []}', "no captions file: expected COCO captions"),
        ("3", "found int"),
        ('[{"image": "a.jpg"}, {"image": "b.jpg", "caption": "b"}, 5]', "2 unusable entries"),
        ('{"images": [{"sentences": []}, {"filename": "a.jpg", "sentences": [1]}]}', "2 unusable entries"),
        (b"\xff\xfe\xfa", "no valid JSON"),
    ],
)
def test_broken_captions_file(root: Path, text: str | bytes, says: str) -> None:
    (root / "captions.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(root)
    assert "captions.json" in message
    assert says in message


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ([1], "no split file"),
        ({"train": 3, "test": [42]}, "train: 3 is no list"),
        ({"train": [7, "x"], "test": [None]}, "test: None is no integer"),
    ],
)
def test_broken_split_file(root: Path, split: object, says: str) -> None:
    dump(root / "split.json", split)
    assert says in refused(root)


def test_missing_captions_file(root: Path) -> None:
    message = refused(root, captions="nowhere.json")
    assert "nowhere.json (data.captions) does not exist" in message
    assert "captions_train.json" in refused(root, captions="captions_{split}.json")


def test_all_that_is_missing_is_told_at_once(root: Path) -> None:
    nowhere = root.parent / "nowhere"
    outside: dict[str, Any] = {
        "generated_captions": nowhere / "g.json",
        "linked_folders": (nowhere, root, nowhere / "l"),
    }
    message = refused(root, captions="caps.json", split="nosplit.json", images="imgs", **outside)
    told = [line.split(" does not exist")[0] for line in message.splitlines()]
    assert told == [
        f"{root / 'caps.json'} (data.captions)",
        f"{root / 'nosplit.json'} (data.split)",
        f"{nowhere / 'g.json'} (data.generated_captions)",
        f"the folder {nowhere} (data.linked_folders)",
        f"the folder {nowhere / 'l'} (data.linked_folders)",
        f"the folder {root / 'imgs'} (data.images)",
    ]
    per_split = refused(root, captions="c_{split}.json").splitlines()
    assert [line.split(" (")[0] for line in per_split] == [str(root / "c_train.json"), str(root / "c_test.json")]
    assert len(refused(nowhere).splitlines()) == 1
