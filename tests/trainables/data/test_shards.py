"""Training pairs from WebDataset shards: read in place, nothing unpacked, every mistake told."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from trainables.config import TEST, DataConfig
from trainables.data import DataError, Dataset, load_dataset


def picture(red: int, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (24, 16), (red, 10, 200)).save(content, kind)
    return content.getvalue()


def write(path: Path, members: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


SHARDS: list[dict[str, bytes]] = [
    {
        "a.png": picture(0),
        "a.txt": b"one\n\ntwo\n",
        "deep/b.png": picture(50),
        "deep/b.json": json.dumps({"caption": "three", "key": "b"}).encode(),
    },
    {
        "a.meta.txt": b"of another kind",
        "a.json": json.dumps({"caption": ["four", "five"]}).encode(),
        "a.png": picture(100),
        "a.txt": b"not read: the json has captions",
    },
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two shards to train on, one image with five captions to evaluate."""
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    (root / "images" / "x.png").write_bytes(picture(250))
    captions = [{"id": k, "image_id": 4, "caption": f"caption {k}"} for k in range(5)]
    document = {"images": [{"id": 4, "file_name": "x.png"}], "annotations": captions}
    (root / "captions.json").write_text(json.dumps(document))
    (root / "split.json").write_text(json.dumps({"test": [4]}))
    for number, members in enumerate(SHARDS):
        write(root / f"train-{number}.tar", members)
    return root


def load(root: Path, **settings: Any) -> Dataset:
    config = DataConfig(root=root, image_pixels=16, **{"shards": "train-*.tar", "eval_split": TEST, **settings})
    return load_dataset(config, root.parent / "cache")


def refused(root: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(root, **settings)
    return str(caught.value)


def test_shards_are_trained_on(root: Path) -> None:
    data = load(root)
    assert data.train.captions == ["one", "two", "three", "four", "five"]
    assert data.train.caption_image.tolist() == [0, 0, 1, 2, 2]
    assert data.train.pixels[:, 0, 0, 0].tolist() == [0, 50, 100]
    assert data.train.image_ids.tolist() == [5, 6, 7], "above those that are evaluated"
    assert (data.evaluation.image_ids.tolist(), data.evaluation.pixels[:, 0, 0, 0].tolist()) == ([4], [250])
    assert isinstance(data.train.pixels, np.memmap)
    write(root / "train-1.tar", {**SHARDS[1], "a.json": b'{"caption": "else"}'})
    changed = load(root)
    assert changed.train.captions == ["one", "two", "three", "else"]
    assert changed.digest != data.digest
    assert load(root, max_train_images=2).train.pixels[:, 0, 0, 0].tolist() == [0, 50]


def test_names_with_coco_ids_are_known_as_such(root: Path) -> None:
    names = ("COCO_val2014_000000391895", "000000000042")
    (root / "train-1.tar").unlink()
    write(root / "train-0.tar", {f"{n}.{k}": v for n in names for k, v in (("jpg", picture(9, "JPEG")), ("txt", b"c"))})
    assert load(root).train.image_ids.tolist() == [391895, 42]
    write(root / "train-0.tar", {"000000000004.jpg": picture(9, "JPEG"), "000000000004.txt": b"c"})
    assert "1 images are both in data.shards 'train-*.tar' and in data.test_split" in refused(root)


def test_names_inside_lead_nowhere_and_pickles_are_not_read(root: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    trap = pickle.dumps(Trap())
    members = {"../../out.png": picture(7), "../../out.txt": b"c", "/abs.png": picture(8), "/abs.txt": b"d"}
    write(root / "train-0.tar", {**members, "../../out.pyd": trap, "/abs.pkl": trap})
    with tarfile.open(root / "train-0.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    data = load(root)
    assert data.train.captions[:2] == ["c", "d"]
    assert data.train.pixels[:2, 0, 0, 0].tolist() == [7, 8]
    made = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(path.is_relative_to(tmp_path / "cache") for path in made)


def test_bad_shards_are_told_at_once(root: Path) -> None:
    write(root / "train-0.tar", SHARDS[0], "w:gz")
    whole = (root / "train-1.tar").read_bytes()
    (root / "train-2.tar").write_bytes(whole[: len(whole) // 20])
    samples = {
        "bare.png": picture(1),
        "blank.png": picture(1),
        "blank.txt": b" \n",
        "broken.png": picture(1),
        "broken.json": b"{",
        "list.png": picture(1),
        "list.json": b"[]",
        "twice.png": picture(1),
        "twice.jpg": picture(1, "JPEG"),
        "twice.txt": b"c",
        "alone.txt": b"c",
        "long.txt": b"c" * (1 << 20) + b"c",
    }
    write(root / "train-3.tar", samples)
    message = refused(root)
    assert "has 9 unusable entries" in message
    for told in (
        "train-0.tar: no plain tar",
        "train-2.tar: no plain tar",
        "train-3.tar/long.txt: 1048577 bytes of text",
        "train-3.tar/bare.png: no captions",
        "train-3.tar/blank.png: no captions",
        "train-3.tar/broken.png: no captions",
        "train-3.tar/list.png: no captions",
        "train-3.tar/twice: 2 images under one name",
        "train-3.tar/alone: captions without an image",
    ):
        assert told in message


def test_images_that_cannot_be_decoded_are_named(root: Path) -> None:
    write(root / "train-0.tar", {"a.png": b"no image", "a.txt": b"c"})
    assert "train-0.tar/a.png: no image Pillow knows" in refused(root)


def test_there_have_to_be_shards_and_a_root(root: Path) -> None:
    assert "no file below" in refused(root, shards="test-*.tar")
    write(root / "empty.tar", {"readme.md": b"c"})
    assert "1 files without any NAME.jpg" in refused(root, shards="empty.tar")
    with pytest.raises(ValidationError, match=r"data.shards needs data.root"):
        DataConfig(shards="*.tar")
    with pytest.raises(ValidationError, match="put the captions into the shards"):
        DataConfig(root=root, shards="*.tar", generated_captions=root / "captions.json")


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("{}/*.tar", "leads out of data.root"),
        ("../*/*.tar", "leads out of data.root"),
        ("**.tar", "is no pattern of files|no file below"),
        ("[", "no file below"),
    ],
)
def test_a_pattern_is_of_files_below_the_root(root: Path, pattern: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        load_dataset(DataConfig(root=root, shards=pattern.format(root), eval_split=TEST), root / "cache")
