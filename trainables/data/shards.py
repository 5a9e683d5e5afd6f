"""WebDataset shards -> training pictures: tar files of `NAME.jpg` with `NAME.txt` or `NAME.json`, read in place.

Nothing is unpacked: an image is a range of bytes of its shard, and names inside are never used as paths.
"""

from __future__ import annotations

import json
import tarfile
from collections import defaultdict
from pathlib import Path

from trainables.data.annotations import Picture
from trainables.data.cache import ImageFile
from trainables.data.errors import DataError, holding
from trainables.data.layouts import number_files

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXT_BYTES = 1 << 20
"""Most that the text of one sample may take."""


def read_shards(root: Path, pattern: str, first_id: int) -> tuple[list[Picture], list[ImageFile]]:
    """All samples, in the order of the shards' names and in the shards' own.

    `NAME.json` has `caption`, a text or a list of texts; otherwise each line of `NAME.txt` is a caption. What else a
    sample has is left alone.

    Args:
        root: folder of the data.
        pattern: of the shards below it, such as `train-*.tar`.
        first_id: images get ids from here on, unless their names carry COCO's.

    Raises:
        DataError: If the pattern leads out of the folder, there are no shards, one is no plain tar, or samples are
            incomplete.
    """
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise DataError(f"data.shards {pattern!r}: leads out of data.root, {root}; give a pattern of files below it")
    try:
        paths = sorted(root.glob(pattern))
    except (ValueError, NotImplementedError) as error:  # what pathlib raises for some patterns
        raise DataError(f"data.shards {pattern!r}: is no pattern of files, such as 'train-*.tar': {error}") from None
    if not paths:
        raise DataError(
            f"no file below {root} fits data.shards {pattern!r}; shards are plain tar files with NAME.jpg and "
            f"NAME.txt or NAME.json; {holding(root, '*.t*')}"
        )
    problems: list[str] = []
    found: dict[str, tuple[ImageFile, list[str]]] = {}
    for path in paths:
        try:
            _read(path, path.relative_to(root).as_posix(), found, problems)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            problems.append(f"{path.name}: no plain tar, as data.shards have to be: {error}")
    if problems:
        raise DataError(f"data.shards {pattern!r} has {len(problems)} unusable entries", problems)
    if not found:
        raise DataError(f"data.shards {pattern!r}: {len(paths)} files without any NAME.jpg")
    ids = number_files(list(found), first_id)
    caption_id, pictures = 0, []
    for name, (_, texts) in found.items():
        pictures.append(Picture(ids[name], name, tuple(enumerate(texts, caption_id)), None))
        caption_id += len(texts)
    return pictures, [file for file, _ in found.values()]


def _read(path: Path, shard: str, found: dict[str, tuple[ImageFile, list[str]]], problems: list[str]) -> None:
    """Add a shard's images with their captions."""
    images: dict[str, list[ImageFile]] = defaultdict(list)
    texts: dict[str, dict[str, bytes]] = defaultdict(dict)
    stamp = path.stat().st_ctime_ns
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            # Up to the first dot of the last part, as WebDataset has it; what comes behind is the kind.
            folder, _, last = member.name.rpartition("/")
            stem, _, kind = last.partition(".")
            key = f"{folder}/{stem}".lstrip("/")
            if not member.isreg() or member.sparse is not None or kind.lower() not in (*IMAGES, "txt", "json"):
                continue
            if kind.lower() in IMAGES:
                name = f"{shard}/{key}.{kind}"
                images[key].append(ImageFile(name, str(path), member.size, stamp, member.offset_data))
            elif member.size > TEXT_BYTES:
                problems.append(f"{shard}/{key}.{kind}: {member.size} bytes of text")
            else:
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                texts[key][kind.lower()] = content.read()
    for key, files in images.items():
        captions = _captions(texts[key])
        if len(files) > 1:
            problems.append(f"{shard}/{key}: {len(files)} images under one name")
        elif not captions:
            problems.append(f"{files[0].name}: no captions, neither in {key}.txt nor as caption in {key}.json")
        else:
            found[files[0].name] = files[0], captions
    problems += [f"{shard}/{key}: captions without an image" for key in texts if key not in images]


def _captions(texts: dict[str, bytes]) -> list[str]:
    """Of one sample; none where they cannot be read."""
    try:
        told = json.loads(texts["json"]).get("caption") if "json" in texts else None
        lines = texts.get("txt", b"").decode().splitlines()
    except (ValueError, AttributeError):
        return []
    captions = [told] if isinstance(told, str) else told
    return [text for text in (captions or lines) if isinstance(text, str) and text.strip()]
