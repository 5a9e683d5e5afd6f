"""The embedded set: what is drawn, what is said of it, and what the masks cover."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from trainables.config import ShapesConfig
from trainables.data import shapes

CONFIG = ShapesConfig(train_images=60, val_images=20, test_images=20)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, CONFIG)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_equal_configs_write_equal_bytes(root: Path, tmp_path: Path) -> None:
    shapes.write(tmp_path / "again", CONFIG)
    assert content(tmp_path / "again") == content(root)
    shapes.write(tmp_path / "seed", CONFIG.model_copy(update={"seed": 1}))
    assert read(tmp_path / "seed" / "captions.json") != read(root / "captions.json")


def test_more_images_keep_the_first(root: Path, tmp_path: Path) -> None:
    shapes.write(tmp_path / "more", CONFIG.model_copy(update={"train_images": 70}))
    more, fewer = content(tmp_path / "more"), content(root)
    assert all(more[name] == fewer[name] for name in fewer if name.startswith("images/"))


def test_splits(root: Path) -> None:
    ids = [image["id"] for image in read(root / "captions.json")["images"]]
    split = read(root / "split.json")
    assert split == {"train": ids[:60], "val": ids[60:80], "test": ids[80:]}
    assert len(set(ids)) == 100


def things_by_image(root: Path) -> dict[int, list[dict[str, Any]]]:
    document = read(root / "instances.json")
    names = {category["id"]: category["name"] for category in document["categories"]}
    things: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in document["images"]}
    for item in document["annotations"]:
        things[item["image_id"]].append({**item, "shape": names[item["category_id"]]})
    return things


def test_captions_tell_what_is_there(root: Path) -> None:
    things = things_by_image(root)
    captions: dict[int, list[str]] = {image_id: [] for image_id in things}
    for item in read(root / "captions.json")["annotations"]:
        captions[item["image_id"]].append(item["caption"])
    for image_id, texts in captions.items():
        true = {f"{thing['colour']} {thing['shape']}" for thing in things[image_id]}
        pairs = [f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES]
        assert len(texts) == 5
        for text in texts:
            said = {pair for pair in pairs if pair in text}
            assert said
            assert said <= true
        assert {pair for pair in true if any(pair in text for text in texts)} == true


def test_background_words_are_true(root: Path) -> None:
    """The shade that all five captions of an image agree on is the brightness of its background."""
    things = things_by_image(root)
    shade_of: dict[int, set[str]] = {}
    for item in read(root / "captions.json")["annotations"]:
        said = {shade for shade in shapes.SHADES if f" {shade} " in item["caption"]}
        shade_of.setdefault(item["image_id"], set()).update(said)
    for image in read(root / "captions.json")["images"]:
        pixels = np.asarray(Image.open(root / "images" / image["file_name"])).astype(float)
        covered = np.zeros(pixels.shape[:2], dtype=bool)
        for thing in things[image["id"]]:
            covered |= decoded(thing["segmentation"]).astype(bool)
        (shade,) = shade_of[image["id"]]
        assert abs(np.median(pixels[~covered]) - shapes.SHADES[shade]) <= 2 * shapes.TEXTURE_LEVELS


def decoded(segmentation: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(coco_mask.frPyObjects(segmentation, *segmentation["size"]))


def test_masks_cover_what_is_drawn(root: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        instances = COCO(str(root / "instances.json"))
    assert set(instances.imgs) == {image["id"] for image in read(root / "captions.json")["images"]}
    for image_id, things in things_by_image(root).items():
        pixels = np.asarray(Image.open(root / "images" / instances.imgs[image_id]["file_name"])).astype(float)
        assert 2 <= len(things) <= 3
        for thing in things:
            mask = decoded(thing["segmentation"]).astype(bool)
            assert (instances.annToMask(thing) == mask).all()
            assert mask.sum() == thing["area"] > 20
            x, y, width, height = coco_mask.toBbox(
                coco_mask.frPyObjects(thing["segmentation"], *thing["segmentation"]["size"])
            )
            assert thing["bbox"] == [x, y, width, height]
            inside = pixels[mask]
            colour = np.median(inside, axis=0)
            assert np.abs(colour - shapes.COLOURS[thing["colour"]]).max() < 30  # five sigma of its jitter
            of_one_colour = np.abs(inside - colour).max(1) < 6 * shapes.NOISE_LEVELS
            assert of_one_colour.mean() > 0.97  # a large diamond's tip may touch the next cell


def test_masks_hardly_overlap(root: Path) -> None:
    for things in things_by_image(root).values():
        assert (sum(decoded(thing["segmentation"]).astype(int) for thing in things) > 1).sum() <= 4


def test_shapes_are_drawn_in_their_cells() -> None:
    for row in range(3):
        for column in range(3):
            where = np.nonzero(shapes.Thing("ring", "red", "large", row, column).mask())
            centre = (np.array([row, column]) + 0.5) * shapes.CELL
            assert np.abs(np.mean(where, axis=1) - centre).max() <= 1


def test_relations_are_true() -> None:
    left = shapes.Thing("circle", "red", "small", 1, 0)
    right = shapes.Thing("square", "blue", "large", 1, 2)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        texts = shapes.describe(shapes.Scene((left, right), "dark", "plain"), rng)
        for text in (texts[0], texts[2]):
            first, second = sorted(("red circle", "blue square"), key=text.index)
            word = "left of" if (first, second) == ("red circle", "blue square") else "right of"
            assert word in text


def test_texture_is_fainter_than_the_shades() -> None:
    """An attacker of a few levels can repaint the texture, and none can repaint an object."""
    scene = shapes.Scene((), "grey", "striped")
    plain = shapes.Scene((), "grey", "plain")
    difference = shapes.render(scene, np.random.default_rng(0)).astype(int) - shapes.render(
        plain, np.random.default_rng(0)
    )
    assert 0 < np.abs(difference).max() <= 2 * shapes.TEXTURE_LEVELS
    assert min(np.diff(sorted(shapes.SHADES.values()))) > 2 * shapes.TEXTURE_LEVELS


def test_writing_is_fast(tmp_path: Path) -> None:
    start = time.process_time()
    shapes.write(tmp_path, ShapesConfig(train_images=300, val_images=50, test_images=50))
    assert time.process_time() - start < 4
