"""What a search measures and what is measured in the end: splits of a set, or a share of its training images."""

from __future__ import annotations

import random
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.trainables.data.coco_set import dump
from trainables.config import TEST, VAL, DataConfig
from trainables.data import DataError, Dataset, load_dataset

TRAIN, HELD = range(1, 41), range(41, 51)


def write(root: Path, splits: dict[str, list[int]], few: Set[int] = frozenset()) -> None:
    (root / "images").mkdir(parents=True)
    numbers = [*TRAIN, *HELD]
    for number in numbers:
        Image.new("RGB", (8, 8), (5 * number, 10, 200)).save(root / "images" / f"{number}.png")
    captions = [
        {"id": 10 * number + k, "image_id": number, "caption": f"caption {k} of {number}"}
        for number in numbers
        for k in range(2 if number in few else 5)
    ]
    images = [{"id": number, "file_name": f"{number}.png"} for number in numbers]
    random.Random(0).shuffle(images)
    dump(root / "captions.json", {"images": images, "annotations": captions})
    dump(root / "split.json", splits)


def load(root: Path, **settings: Any) -> Dataset:
    return load_dataset(DataConfig(root=root, image_pixels=16, **settings), root.parent / "cache")


def ids(root: Path, **settings: Any) -> tuple[set[int], set[int]]:
    found = load(root, **settings)
    return set(found.train.image_ids.tolist()), set(found.evaluation.image_ids.tolist())


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_set_without_a_val_holds_a_share_of_the_training_images_out(tmp_path: Path, share: float) -> None:
    few = {1, 2, 3, 4, 5}
    write(tmp_path / "set", {"train": list(TRAIN), "test": list(HELD)}, few)
    train, val = ids(tmp_path / "set", val_share=share)
    assert len(val) == round(share * len(TRAIN))
    assert not val & few, "of those with enough captions"
    assert train == set(TRAIN) - val
    assert ids(tmp_path / "set", val_share=share, eval_split=TEST) == (train, set(HELD)), "never trained on"
    assert load(tmp_path / "set", val_share=share).train.digest == (
        load(tmp_path / "set", val_share=share, eval_split=TEST).train.digest
    )
    smaller = ids(tmp_path / "set", val_share=share / 2)[1]
    assert smaller < val, "chosen by the ids alone"


def test_a_set_with_a_val_is_searched_on_it_and_nothing_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "set", {"train": list(TRAIN), "val": [41, 42], "test": list(HELD[2:])})
    assert ids(tmp_path / "set") == (set(TRAIN), {41, 42})
    assert ids(tmp_path / "set", eval_split=TEST) == (set(TRAIN), set(HELD[2:]))
    assert ids(tmp_path / "set", val_split="test", test_split="val") == (set(TRAIN), set(HELD[2:]))
    with pytest.raises(DataError, match=r"data\.val_split 'dev'"):
        load(tmp_path / "set", val_split="dev")


def test_no_split_shares_an_image_with_another_whichever_is_measured(tmp_path: Path) -> None:
    write(tmp_path / "set", {"train": list(TRAIN), "val": [41, 42], "test": [42, 43]})
    for split in (VAL, TEST):
        with pytest.raises(
            DataError, match=r"both in data\.val_split 'val' and in data\.test_split 'test'.*\n.*image 42 "
        ):
            load(tmp_path / "set", eval_split=split)


def test_nothing_to_hold_out_is_told(tmp_path: Path) -> None:
    write(tmp_path / "set", {"train": list(TRAIN), "test": list(HELD)}, set(TRAIN))
    with pytest.raises(DataError, match=r"data\.val_share 0\.1 of 40 training images has 0 images.*the most is 2"):
        load(tmp_path / "set")
