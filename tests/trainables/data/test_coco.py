"""Captions and split files: what is read of them, and how splits fit together."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from coco_set import NAMES, captions_of, coco_document, dump, load, refused, train_rows
from PIL import Image

from trainables.config import TEST, DataConfig, ShapesConfig
from trainables.data import DataError, annotations, layouts, load_dataset

REAL = Path(os.environ.get("PARETOVL_TEST_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


def real(name: str) -> Path:
    if not (REAL / name).is_dir():  # photographs under their owners' licences are not part of a checkout
        pytest.skip(f"no real data at {REAL / name}; put it beside the checkout or set PARETOVL_TEST_DATA")
    return REAL / name


def test_order_and_positions(root: Path) -> None:
    data = load(root)
    assert data.train.image_ids.tolist() == [391895, 7]
    assert data.train.captions == captions_of(391895) + captions_of(7)
    assert data.train.caption_ids.tolist() == [3918950 + k for k in range(5)] + [70 + k for k in range(5)]
    assert data.train.caption_image.tolist() == [0] * 5 + [1] * 5
    assert data.evaluation.image_ids.tolist() == [42]
    assert data.evaluation.caption_image.tolist() == [0] * 5
    for split in (data.train, data.evaluation):
        assert {split.image_ids.dtype, split.caption_ids.dtype, split.caption_image.dtype} == {np.dtype(np.int64)}
    # JPEG moves a flat colour by a level or two; the blue of image k is 200, its red 80 k.
    assert np.abs(data.train.pixels[:, 0].mean((1, 2)) - [0, 160]).max() < 4
    assert abs(data.evaluation.pixels[0, 0].mean() - 80) < 4


def test_quiet(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(root)
    assert capsys.readouterr() == ("", "")


def test_first_training_images(root: Path) -> None:
    data = load(root, max_train_images=1)
    assert data.train.image_ids.tolist() == [391895]
    assert len(data.train.captions) == len(data.train.caption_image) == 5
    assert data.train.pixels.shape == (1, 3, 16, 16)
    assert data.digest != load(root).digest


def test_captions_of_a_captioner_are_further_captions_of_training_images(root: Path) -> None:
    rows = [{"image_id": 7, "caption": "one"}, {"image_id": 42, "caption": "test"}, {"image_id": 7, "caption": "two"}]
    path = root.parent / "generated.json"
    dump(path, rows)
    plain, more = load(root), load(root, generated_captions=path)
    assert more.train.captions == [*captions_of(391895), *captions_of(7), "one", "two"]
    assert more.train.caption_image.tolist() == [0] * 5 + [1] * 7
    assert len({*more.train.caption_ids, *more.evaluation.caption_ids}) == 5 + 7 + 5
    assert more.evaluation.captions == plain.evaluation.captions == captions_of(42)
    dump(path, rows[1:])
    assert len({plain.digest, more.digest, load(root, generated_captions=path).digest}) == 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist"),
        ("[", "no valid JSON"),
        ('{"annotations": []}', "no list of {image_id, caption}, but a dict"),
        ('[{"image_id": 7, "caption": " "}]', "[0]: expected {image_id: integer, caption: text}"),
        ('[{"image_id": "7", "caption": "a"}, 3]', "has 2 unusable entries"),
        ('[{"image_id": 7, "caption": "a"}, {"image_id": 8, "caption": "b"}]', "[1]: image_id 8 is no image"),
        ('[{"image_id": 42, "caption": "a"}]', "captions for 1 images, none of which is trained on"),
        ("[]", "captions for 0 images"),
    ],
)
def test_bad_captions_of_a_captioner_are_told(root: Path, content: str | None, told: str) -> None:
    path = root.parent / "generated.json"
    if content is not None:
        path.write_text(content)
    message = refused(root, generated_captions=path)
    assert told in message
    assert f"{path} (data.generated_captions)" in message


def test_evaluation_needs_enough_captions(root: Path) -> None:
    document = coco_document()
    document["annotations"] = [item for item in document["annotations"] if item["id"] not in (420, 3918950)]
    dump(root / "captions.json", document)
    dump(root / "split.json", {"train": [7], "test": [391895, 42]})
    assert "the most is 4" in refused(root)
    assert load(root, eval_min_captions=4).evaluation.image_ids.tolist() == [391895, 42]
    document["annotations"].append({"id": 1, "image_id": 42, "caption": "one more"})
    dump(root / "captions.json", document)
    assert load(root).evaluation.image_ids.tolist() == [42]


def test_restval_is_optional_and_others_are_not(root: Path) -> None:
    assert load(root).digest == load(root, train_splits=("train",)).digest
    message = refused(root, train_splits=("train", "trian"), test_split="tset")
    assert "'trian'" in message
    assert "'tset'" in message
    assert "there are: train, test" in message


def test_no_splits_at_all(root: Path) -> None:
    (root / "split.json").unlink()
    message = refused(root)
    for accepted in ("split.json", "data.split", '{"train": [image id', "Karpathy", "{split}"):
        assert accepted in message


def carrying(root: Path, splits: dict[int, str]) -> None:
    document = coco_document()
    for image in document["images"]:
        image["split"] = splits[image["id"]]
    dump(root / "captions.json", document)


def test_a_split_file_beside_other_splits_has_to_be_named(root: Path) -> None:
    carrying(root, {391895: "train", 7: "test", 42: "test"})
    message = refused(root)  # split.json has 7 in train
    assert (
        f"{root / 'captions.json'} carries splits, and {root / 'split.json'} beside it has others: 1 images" in message
    )
    assert "image 7: test by the one, training by the other" in message
    assert "data.split split.json" in message
    assert load(root, split="split.json").evaluation.image_ids.tolist() == [42]
    (root / "split.json").unlink()
    assert load(root).evaluation.image_ids.tolist() == [7, 42] or load(root).evaluation.image_ids.tolist() == [42, 7]
    assert "split.json (data.split) does not exist" in refused(root, split="split.json")


def test_a_split_file_that_says_the_same_is_no_matter(root: Path) -> None:
    carrying(root, {391895: "train", 7: "restval", 42: "test"})  # both are trained on
    assert load(root).train.image_ids.tolist() == [391895, 7]


def test_one_file_a_split_is_named_by_itself(root: Path) -> None:
    with pytest.raises(ValueError, match=r"one file a split, so give no data\.split"):
        load(root, captions="captions_{split}.json", split="split.json")


def test_a_split_that_is_given_twice(root: Path) -> None:
    (root / "split.json").write_text('{"train": [7], "test": [42], "train": [391895]}')
    assert "train is there more than once" in refused(root)


def test_messages_name_the_file_what_is_read_and_what_is_there(root: Path) -> None:
    (root / "captions.json").rename(root / "dataset_coco.json")
    message = refused(root)
    assert f"{root / 'captions.json'} (data.captions) does not exist" in message
    assert "COCO captions {images, annotations}, Karpathy" in message
    assert f"{root} has dataset_coco.json, split.json" in message
    (root / "val2014").mkdir()
    message = refused(root, captions="dataset_coco.json", images="train2014")
    assert f"the folder {root / 'train2014'} (data.images) does not exist" in message
    assert f"{root} has images, val2014" in message
    (root / "dataset_coco.json").write_text('{"info": 1}')
    message = refused(root, captions="dataset_coco.json")
    assert f"{root / 'dataset_coco.json'} is no captions file: expected COCO captions" in message
    assert f"{root / 'no'} is no folder" in refused(root / "no")


def test_leak_by_id(root: Path) -> None:
    dump(root / "split.json", {"train": [391895, 7, 42], "test": [42, 391895]})
    message = refused(root)
    assert "image 42 " in message
    assert "image 391895 " in message
    assert "image 7 " not in message
    # Not even where the limit cuts the leaking image off: which images are trained on must not depend on it.
    assert "image 42 " in refused(root, max_train_images=1)


def test_leak_by_split_name(root: Path) -> None:
    assert "image 42 " in refused(root, train_splits=("train", "test"))


def test_leak_by_file(root: Path) -> None:
    document = coco_document()
    document["images"][1]["file_name"] = f"./{NAMES[7]}"
    dump(root / "captions.json", document)
    message = refused(root)
    assert f"image 42: {NAMES[7]} is also image 7 there" in message


def test_leak_between_lists(root: Path) -> None:
    dump(root / "train.json", train_rows([391895, 7, 42]))
    dump(root / "test.json", [{"image": NAMES[42], "caption": captions_of(42)}])
    message = refused(root, captions="{split}.json")
    assert "image 42: id used 2 times, in splits train, test" in message


def test_split_ids_without_captions(root: Path) -> None:
    document = coco_document()
    document["annotations"] = [item for item in document["annotations"] if item["image_id"] != 7]
    dump(root / "captions.json", document)
    dump(root / "split.json", {"train": [391895, 7, 99], "test": [42, 100], "unused": [101]})
    message = refused(root)
    for problem in ("image 7: no captions", "image 99: unknown", "image 100: unknown"):
        assert problem in message
    assert "101" not in message


def test_empty_sides(root: Path) -> None:
    dump(root / "split.json", {"train": [], "test": [42]})
    assert "no training images" in refused(root)
    dump(root / "split.json", {"train": [7], "test": []})
    assert "no evaluation images" in refused(root)


def test_digest_follows_content_only(root: Path, tmp_path: Path) -> None:
    first = load(root).digest
    for path in (root / "images").iterdir():
        os.utime(path, (1, 1))
    document = coco_document()
    document["info"] = {"description": "changes nothing that is read"}
    dump(root / "captions.json", document)
    assert load(root).digest == first
    moved = root.rename(tmp_path / "moved")
    assert load(moved).digest == first
    changes = [
        load(moved, resize="stretch"),
        load_dataset(DataConfig(root=moved, image_pixels=17, eval_split=TEST), tmp_path),
    ]
    document["annotations"][0]["caption"] += "!"
    dump(moved / "captions.json", document)
    changes.append(load(moved))
    Image.new("RGB", (240, 16), "red").save(moved / "images" / NAMES[7])
    changes.append(load(moved))
    dump(moved / "split.json", {"train": [7], "test": [42]})
    changes.append(load(moved))
    assert len({first, *(data.digest for data in changes)}) == 6


@pytest.mark.parametrize("same_time", [False, True])
def test_an_image_in_place_of_another_as_long_is_seen(root: Path, same_time: bool) -> None:
    image = root / "images" / NAMES[42]
    Image.new("RGB", (16, 16), "red").save(image, "BMP")
    before, status = load(root), image.stat()
    time.sleep(0.02)  # more than a file system's tick
    Image.new("RGB", (16, 16), "blue").save(image, "BMP")
    if same_time:  # as `cp -p` and `rsync -t` leave it
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert image.stat().st_size == status.st_size
    after = load(root)
    assert after.digest != before.digest
    assert after.evaluation.pixels[0, :, 8, 8].tolist() == [0, 0, 255]
    assert before.evaluation.pixels[0, :, 8, 8].tolist() == [255, 0, 0]


def test_message_is_capped_and_survives_pickling() -> None:
    error = DataError("bad", [f"line {k}" for k in range(25)])
    assert str(error).splitlines()[-1].strip() == "... and 5 more (25 in all)"
    assert len(str(error).splitlines()) == 22
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_real_coco(tmp_path: Path) -> None:
    root = real("coco_small")
    data = load_dataset(DataConfig(root=root, image_pixels=32, max_train_images=40, eval_split=TEST), tmp_path)
    document = json.loads((root / "captions.json").read_text())
    split = json.loads((root / "split.json").read_text())
    texts: dict[int, list[str]] = {}
    for item in document["annotations"]:
        texts.setdefault(item["image_id"], []).append(item["caption"])
    order = [image["id"] for image in document["images"]]
    trainable = {*split["train"], *split["restval"]}
    enough = {image_id for image_id in split["test"] if len(texts[image_id]) >= 5}
    assert data.train.image_ids.tolist() == [i for i in order if i in trainable][:40]
    assert data.evaluation.image_ids.tolist() == [i for i in order if i in enough]
    for part in (data.train, data.evaluation):
        for caption, position in zip(part.captions, part.caption_image, strict=True):
            assert caption in texts[part.image_ids[position]]
        assert np.bincount(part.caption_image).tolist() == [len(texts[i]) for i in part.image_ids]
    stored = {image["id"]: image["file_name"] for image in document["images"]}
    with Image.open(root / "images" / stored[int(data.evaluation.image_ids[3])]) as image:
        colour = np.asarray(image.convert("RGB")).mean((0, 1))
    config = DataConfig(root=root, image_pixels=32, max_train_images=40, eval_split=TEST, resize="stretch")
    stretched = load_dataset(config, tmp_path)
    assert np.abs(stretched.evaluation.pixels[3].mean((1, 2)) - colour).max() < 2


def test_real_flickr(tmp_path: Path) -> None:
    root = real("flickr8k_144")
    config = DataConfig(root=root, image_pixels=16, max_train_images=20, eval_split=TEST)
    data = load_dataset(config, tmp_path)
    split = json.loads((root / "split.json").read_text())
    assert set(data.evaluation.image_ids) == set(split["test"])
    assert np.bincount(data.evaluation.caption_image).tolist() == [5] * len(split["test"])
    assert data.train.pixels.shape == (20, 3, 16, 16)


def test_real_karpathy_test_file(tmp_path: Path) -> None:
    path = real("coco_small").parent / "coco_karpathy_test_captions.json"
    pictures = annotations.index_pictures(layouts.to_coco(json.loads(path.read_bytes()), path.name), path.name)
    assert len(pictures) == 5000
    assert sum(len(picture.captions) for picture in pictures) == 25010
    assert (pictures[0].id, pictures[0].file_name) == (391895, "val2014/COCO_val2014_000000391895.jpg")


def test_embedded_shapes(tmp_path: Path) -> None:
    config = DataConfig(shapes=ShapesConfig(train_images=12, val_images=8, test_images=8), image_pixels=16)
    data = load_dataset(config, tmp_path)
    assert (data.train.pixels.shape, data.evaluation.pixels.shape) == ((12, 3, 16, 16), (8, 3, 16, 16))
    assert (len(data.train.captions), len(data.evaluation.captions)) == (60, 40)
    # A data set that was described and not named is not the embedded one.
    elsewhere = config.model_copy(update={"captions": "x.json", "train_splits": ("a",)})
    with pytest.raises(DataError, match=r"data.captions, data.train_splits: given, but data.root"):
        load_dataset(elsewhere, tmp_path)
    other = config.model_copy(update={"shapes": ShapesConfig(train_images=12, val_images=8, test_images=8, seed=1)})
    assert load_dataset(other, tmp_path).digest != data.digest


def test_killed_shapes_writer_leaves_no_half_set(tmp_path: Path) -> None:
    config = DataConfig(shapes=ShapesConfig(train_images=12, val_images=8, test_images=8), image_pixels=16)
    load_dataset(config, tmp_path / "a")
    name = next(path.name for path in (tmp_path / "a").iterdir() if path.is_dir())
    (tmp_path / "b" / f"{name}.tmp" / "images").mkdir(parents=True)
    (tmp_path / "b" / f"{name}.tmp" / "images" / "stale.png").touch()
    load_dataset(config, tmp_path / "b")
    assert not (tmp_path / "b" / f"{name}.tmp").exists()
    assert not (tmp_path / "b" / name / "images" / "stale.png").exists()


def test_cached_start_is_fast(tmp_path: Path) -> None:
    config = DataConfig(root=real("coco_small"), image_pixels=16)
    load_dataset(config, tmp_path)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load_dataset(config, tmp_path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_imports_no_tensor_library() -> None:
    code = "import sys, trainables.data; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
