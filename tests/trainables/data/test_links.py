"""File names stay inside the image folder, unless the folders that links lead to are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from coco_set import NAMES, coco_document, dump, load, refused
from PIL import Image

from trainables.data import DataError
from trainables.data.cache import locate


def test_names_that_leave_the_folder(root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "secret.png")
    (root / "images" / "link.png").symlink_to(outside / "secret.png")
    (root / "images" / "folder").symlink_to(outside)
    (root / "images" / "near.jpg").symlink_to(root / "images" / NAMES[7])
    names = ["../split.json", "a/../../split.json", "..", str(outside / "secret.png")]
    linked = ["link.png", "folder/secret.png", "folder/missing.png"]
    with pytest.raises(DataError) as caught:
        locate(root / "images", [*names, *linked, "near.jpg", NAMES[42], "missing.jpg"])
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert [line.split(": ")[0] for line in lines[:4]] == names
    assert lines[4:] == [
        f"link.png is a link to {outside / 'secret.png'} (1 images)",
        f"folder is a link to {outside} (2 images)",
    ]
    near, plain, missing = locate(root / "images", ["near.jpg", NAMES[42], "missing.jpg"])
    assert near.path == str((root / "images" / NAMES[7]).resolve())
    assert (plain.size, missing.size) == ((root / "images" / NAMES[42]).stat().st_size, -1)


def test_links_may_lead_to_folders_that_are_named(root: Path) -> None:
    photos = root.parent / "disk" / "photos"
    photos.mkdir(parents=True)
    (root / "images" / NAMES[42]).rename(photos / NAMES[42])  # a linked file, as git-annex and DVC have it
    (root / "images" / NAMES[42]).symlink_to(photos / NAMES[42])
    message = refused(root)
    assert f"{NAMES[42]} is a link to {photos / NAMES[42]} (1 images)" in message
    assert "name the folders they lead to in data.linked_folders" in message
    assert load(root, linked_folders=(photos,)).evaluation.image_ids.tolist() == [42]
    assert load(root, linked_folders=(root.parent / "disk",)).evaluation.image_ids.tolist() == [42]
    (root.parent / "dis").mkdir()
    assert "is a link to" in refused(root, linked_folders=(root.parent / "dis",))  # the same letters, another folder
    # What is named opens no way for names that lead out by themselves.
    document = coco_document()
    document["images"][1]["file_name"] = f"../../disk/photos/{NAMES[42]}"
    dump(root / "captions.json", document)
    assert "absolute, or with '..'" in refused(root, linked_folders=(photos,))


def test_a_linked_folder_of_images(root: Path) -> None:
    photos = root.parent / "val2014"
    (root / "images").rename(photos)
    (root / "images").mkdir()
    (root / "images" / "val2014").symlink_to(photos)
    document = coco_document()
    for image in document["images"]:
        image["file_name"] = f"val2014/{image['file_name']}"
    dump(root / "captions.json", document)
    assert f"val2014 is a link to {photos} (3 images)" in refused(root)
    assert load(root, linked_folders=(photos,)).evaluation.image_ids.tolist() == [42]


def test_annotations_that_leave_the_folder(root: Path) -> None:
    document = coco_document()
    document["images"][0]["file_name"] = "../split.json"
    document["images"][2]["file_name"] = "/etc/hostname"
    dump(root / "captions.json", document)
    message = refused(root)
    assert "../split.json" in message
    assert "/etc/hostname" in message


def test_image_folder_may_be_a_link(root: Path) -> None:
    (root / "images").rename(root.parent / "elsewhere")
    assert "does not exist" in refused(root)
    (root / "images").symlink_to(root.parent / "elsewhere")
    assert load(root).evaluation.image_ids.tolist() == [42]
