"""Captions files of the literature, rewritten as COCO captions documents.

* COCO captions: `{images: [{id, file_name}], annotations: [{id, image_id, caption}]}`;
* Karpathy's `dataset_coco.json`: `{images: [{filename, filepath, cocoid, split, sentences: [...]}]}`,
  sentences being `{raw, sentid}`, with `imgid` where there is no `cocoid`;
* the lists of ALBEF and BLIP: `[{image, caption}]`; `caption` is a text (training) or a list of texts (test).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trainables.data.errors import DataError

COCO_NAME = re.compile(r"(?:^|[_/])(\d{12})\.\w+$")
"""The image id in `COCO_val2014_000000391895.jpg` and `000000391895.jpg`."""

CAPTIONS_FILE = (
    "COCO captions {images, annotations}, Karpathy {images: [{filename, split, sentences}]} "
    "or a list of {image, caption}"
)


def to_coco(document: Any, source: str) -> dict[str, list[Any]]:
    """Rewrite any of the accepted shapes as a COCO captions document; its entries are not checked yet.

    Raises:
        DataError: If it is none of the shapes.
    """
    if isinstance(document, list):
        return _rows_to_coco(document, source)
    images = document.get("images") if isinstance(document, dict) else None
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if isinstance(images, list) and isinstance(annotations, list):
        return {"images": images, "annotations": annotations}
    if isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images):
        return _karpathy_to_coco(images, source)
    keys = f" with keys {list(document)!r:.200}" if isinstance(document, dict) else ""
    raise DataError(f"{source} is no captions file: expected {CAPTIONS_FILE}, found {type(document).__name__}{keys}")


def _karpathy_to_coco(images: list[Any], source: str) -> dict[str, list[Any]]:
    """Karpathy's `dataset_coco.json` (Karpathy and Fei-Fei 2015); captions are the raw sentences."""
    problems = [
        f"images[{position}]: expected {{filename, cocoid or imgid, split, sentences: [{{raw, sentid}}]}}"
        for position, image in enumerate(images)
        if not isinstance(image, dict)
        or not isinstance(image.get("filename"), str)
        or not isinstance(image.get("filepath"), str | None)
        or not isinstance(image.get("sentences"), list)
        or not all(isinstance(sentence, dict) for sentence in image["sentences"])
    ]
    if problems:
        raise DataError(f"{source} has {len(problems)} unusable entries", problems)
    coco: dict[str, list[Any]] = {"images": [], "annotations": []}
    for image in images:
        image_id = image.get("cocoid", image.get("imgid"))
        file_name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
        coco["images"].append({"id": image_id, "file_name": file_name, "split": image.get("split")})
        coco["annotations"] += [
            {"id": sentence.get("sentid"), "image_id": image_id, "caption": sentence.get("raw")}
            for sentence in image["sentences"]
        ]
    return coco


def _rows_to_coco(rows: list[Any], source: str) -> dict[str, list[Any]]:
    """The lists of ALBEF (Li et al. 2021) and BLIP (Li et al. 2022); rows of one image are gathered."""
    problems = [
        f"[{position}]: expected {{image: file name, caption: text or list of texts}}"
        for position, row in enumerate(rows)
        if not isinstance(row, dict)
        or not isinstance(row.get("image"), str)
        or not isinstance(row.get("caption"), str | list)
    ]
    if problems:
        raise DataError(f"{source} has {len(problems)} unusable entries", problems)
    ids = number_files(list(dict.fromkeys(row["image"] for row in rows)))
    # An image in two split files stays there twice, so that the checker sees its id repeated.
    images = dict.fromkeys((row["image"], row.get("split")) for row in rows)
    captions = [
        (ids[row["image"]], caption)
        for row in rows
        for caption in (row["caption"] if isinstance(row["caption"], list) else [row["caption"]])
    ]
    return {
        "images": [{"id": ids[name], "file_name": name, "split": split} for name, split in images],
        "annotations": [
            {"id": position, "image_id": image_id, "caption": caption}
            for position, (image_id, caption) in enumerate(captions, 1)
        ],
    }


def number_files(names: Sequence[str], first: int = 1) -> dict[str, int]:
    """The COCO id of every file if all names carry one and no two the same, else the running index from `first`."""
    matches = [COCO_NAME.search(name) for name in names]
    ids = {int(match[1]) for match in matches if match}
    if len(ids) == len(names):
        return {name: int(match[1]) for name, match in zip(names, matches, strict=True) if match}
    return {name: position for position, name in enumerate(names, first)}
