"""A COCO captions document, checked as a whole and indexed by image."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainables.data.errors import DataError


@dataclass(frozen=True)
class Picture:
    """One image of the captions file and its captions, in file order.

    `file_name` is relative to the image folder; `captions` are (caption id, text); `split` is what the
    captions file itself says.
    """

    id: int
    file_name: str
    captions: tuple[tuple[int, str], ...]
    split: str | None


def index_pictures(document: dict[str, list[Any]], source: str) -> list[Picture]:
    """Check a COCO captions document as a whole and index it by image.

    Args:
        document: `images` and `annotations`.
        source: Name of the file, for messages.

    Raises:
        DataError: With every missing or wrong field, repeated id and unknown `image_id`.
    """
    images, annotations = document["images"], document["annotations"]
    problems = [*_image_problems(images), *_repeated("image", images)]
    image_ids = {image["id"] for image in images if isinstance(image, dict) and is_id(image.get("id"))}
    problems += [*_annotation_problems(annotations, image_ids), *_repeated("annotation", annotations)]
    if problems:
        raise DataError(f"{source} has {len(problems)} unusable entries", problems)
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return [
        Picture(
            id=image_id,
            file_name=image["file_name"],
            captions=tuple((item["id"], item["caption"]) for item in coco.imgToAnns.get(image_id, ())),
            split=image.get("split"),
        )
        for image_id, image in coco.imgs.items()
    ]


def is_id(value: object) -> bool:
    """Whether it is an integer of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_text(value: object) -> bool:
    """Whether it is a string with more than spaces."""
    return isinstance(value, str) and bool(value.strip())


def _image_problems(images: Sequence[Any]) -> list[str]:
    problems = []
    for position, image in enumerate(images):
        if not isinstance(image, dict):
            problems.append(f"images[{position}]: {image!r} is no object")
            continue
        if not is_id(image.get("id")):
            problems.append(f"images[{position}]: id {image.get('id')!r} is no integer")
        if not is_text(image.get("file_name")):
            problems.append(f"image {image.get('id')}: file_name {image.get('file_name')!r} is no text")
        if not isinstance(image.get("split"), str | None):
            problems.append(f"image {image.get('id')}: split {image['split']!r} is no text")
    return problems


def _annotation_problems(annotations: Sequence[Any], image_ids: set[int]) -> list[str]:
    problems = []
    for position, item in enumerate(annotations):
        if not isinstance(item, dict):
            problems.append(f"annotations[{position}]: {item!r} is no object")
            continue
        if not is_id(item.get("id")):
            problems.append(f"annotations[{position}]: id {item.get('id')!r} is no integer")
        if not is_id(item.get("image_id")) or item["image_id"] not in image_ids:
            problems.append(f"annotation {item.get('id')}: image_id {item.get('image_id')!r} is no image of the file")
        if not is_text(item.get("caption")):
            problems.append(f"annotation {item.get('id')}: caption {item.get('caption')!r} is no text")
    return problems


def _repeated(kind: str, items: Sequence[Any]) -> list[str]:
    splits = defaultdict(list)
    for item in items:
        if isinstance(item, dict) and is_id(item.get("id")):
            splits[item["id"]].append(str(item.get("split")))
    return [
        f"{kind} {item_id}: id used {len(names)} times"
        + (f", in splits {', '.join(names)}" if len(set(names)) > 1 else "")
        for item_id, names in splits.items()
        if len(names) > 1
    ]
