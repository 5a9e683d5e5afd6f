"""Captions files of other layouts read as COCO's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coco_set import NAMES, SPLITS, captions_of, coco_document, dump, load, train_rows

from trainables.data import Dataset


def karpathy(split_of: dict[int, str]) -> dict[str, Any]:
    return {
        "dataset": "coco",
        "images": [
            {
                "filename": name,
                "filepath": "",
                "cocoid": image_id,
                "imgid": position,
                "split": split_of[image_id],
                "sentids": [image_id * 10 + k for k in range(5)],
                "sentences": [
                    {"raw": text, "tokens": text.split(), "imgid": position, "sentid": image_id * 10 + k}
                    for k, text in enumerate(captions_of(image_id))
                ],
            }
            for position, (image_id, name) in enumerate(NAMES.items())
        ],
    }


def assert_same(one: Dataset, other: Dataset, caption_ids: bool) -> None:
    for left, right in ((one.train, other.train), (one.evaluation, other.evaluation)):
        assert left.image_ids.tolist() == right.image_ids.tolist()
        assert left.captions == right.captions
        assert left.caption_image.tolist() == right.caption_image.tolist()
        assert (left.pixels == right.pixels).all()
        if caption_ids:
            assert left.caption_ids.tolist() == right.caption_ids.tolist()


def test_karpathy_reads_as_coco(root: Path) -> None:
    expected = load(root)
    (root / "split.json").unlink()
    dump(root / "dataset_coco.json", karpathy({391895: "restval", 42: "test", 7: "train"}))
    found = load(root, captions="dataset_coco.json")
    assert_same(found, expected, caption_ids=True)
    assert found.digest == expected.digest


def test_karpathy_file_path(root: Path) -> None:
    (root / "images" / "val2014").mkdir()
    (root / "images" / NAMES[42]).rename(root / "images" / "val2014" / NAMES[42])
    document = karpathy({391895: "train", 42: "test", 7: "train"})
    document["images"][1]["filepath"] = "val2014"
    del document["images"][0]["cocoid"], document["images"][0]["filepath"]
    dump(root / "dataset_coco.json", document)
    (root / "split.json").unlink()
    data = load(root, captions="dataset_coco.json")
    assert data.train.image_ids.tolist() == [0, 7]
    assert abs(data.evaluation.pixels[0, 0].mean() - 80) < 4


def test_lists_read_as_coco(root: Path) -> None:
    expected = load(root)
    dump(root / "split.json", {"train": [], "test": []})  # the path names the splits, this is not looked at
    dump(root / "coco_karpathy_train.json", train_rows([391895, 7]))
    dump(root / "coco_karpathy_test.json", [{"image": NAMES[42], "caption": captions_of(42)}])
    found = load(root, captions="coco_karpathy_{split}.json")
    assert_same(found, expected, caption_ids=False)
    assert len({*found.train.caption_ids, *found.evaluation.caption_ids}) == 15


def test_coco_documents_per_split(root: Path) -> None:
    expected = load(root)
    document = coco_document()
    for split, ids in SPLITS.items():
        part = {
            "images": [image for image in document["images"] if image["id"] in ids],
            "annotations": [item for item in document["annotations"] if item["image_id"] in ids],
        }
        dump(root / f"captions_{split}.json", part)
    assert_same(load(root, captions="captions_{split}.json"), expected, caption_ids=True)


def test_list_with_a_split_file(root: Path) -> None:
    expected = load(root)
    dump(root / "all.json", [{"image": name, "caption": captions_of(i)} for i, name in NAMES.items()])
    assert_same(load(root, captions="all.json"), expected, caption_ids=False)


def test_other_file_names_are_numbered(root: Path) -> None:
    (root / "images" / NAMES[7]).rename(root / "images" / "dog.jpg")
    rows = train_rows([391895, 7])
    for row in rows[5:]:
        row["image"] = "dog.jpg"
    dump(root / "train.json", rows)
    dump(root / "test.json", [{"image": NAMES[42], "caption": captions_of(42)}])
    data = load(root, captions="{split}.json")
    assert (data.train.image_ids.tolist(), data.evaluation.image_ids.tolist()) == ([1, 2], [3])
