"""Captions and split files -> the pictures to train on and to evaluate on.

Every accepted layout (`layouts`) is first rewritten as a COCO captions document, so that one checker and one index
(pycocotools) serve them all.

Splits come from the captions path if it has `{split}` in it (one file per split), else from the split file if there is
one, else from the `split` of each image. Where both are there and differ, the split file has to be named.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from trainables.config import TEST, VAL, DataConfig, SplitName
from trainables.data.annotations import Picture, index_pictures, is_id, is_text
from trainables.data.errors import DataError, holding
from trainables.data.layouts import CAPTIONS_FILE, to_coco

OPTIONAL_SPLITS = frozenset({"restval"})
"""Only Karpathy's COCO has it, and some files fold it into `train`: naming it must not fail elsewhere."""

SPLIT_NAME = "split.json"
"""Of the split file, where none is named."""

ALL = "all splits"

SPLIT_FILE = '{"train": [image id, ...], "val": [image id, ...], "test": [image id, ...]}'
GENERATED_FILE = "a list [{image_id, caption}]"


def read_pictures(config: DataConfig, root: Path) -> tuple[list[Picture], list[Picture]]:
    """The training pictures of a data set and those that are measured, in the order of the captions file.

    Raises:
        DataError: If files are missing, malformed or contradict each other, or if nothing is left.
    """
    refuse_missing(config, root)
    source = str(root / config.captions)
    pictures = index_pictures(to_coco(_load_captions(config, root), source), source)
    splits = _splits(config, root, pictures)
    train, test = select(pictures, splits, config)
    if config.generated_captions is not None:
        train = with_generated(train, pictures, config.generated_captions)
    return train, test


def annotation_files(config: DataConfig, root: Path) -> list[tuple[str, Path]]:
    """The files that `read_pictures` reads, each with what it is to the data set."""
    files = [(f"captions {split}", path) for split, path in _caption_files(config, root).items()]
    split = root / (config.split or SPLIT_NAME)
    if "{split}" not in config.captions and (config.split is not None or split.exists()):
        files.append(("split", split))
    if config.generated_captions is not None:
        files.append(("generated", config.generated_captions))
    return files


def _splits(config: DataConfig, root: Path, pictures: Sequence[Picture]) -> dict[str, list[int]]:
    """Image ids by split: of the split file if it is named, or there alone, else as the captions carry them.

    Raises:
        DataError: If there are none, or two that disagree and nobody said which counts.
    """
    carried = _carried_splits(pictures)
    if "{split}" in config.captions:
        return carried
    name = config.split or SPLIT_NAME
    if config.split is None and not (root / name).exists():
        if carried:
            return carried
        raise DataError(
            f"{root / name} (data.split) does not exist and {root / config.captions} carries no splits; give a split "
            f"file {SPLIT_FILE}, Karpathy JSON, or one captions file per split with {{split}} in its name; "
            f"{holding(root, '*.json')}"
        )
    given = _checked_splits(_load_json(root / name, "data.split", SPLIT_FILE), name)
    if config.split is None and carried:
        one, other = (_uses(splits, config) for splits in (carried, given))
        moved = [number for number in sorted({*one, *other}) if one.get(number) != other.get(number)]
        if moved:
            raise DataError(
                f"{root / config.captions} carries splits, and {root / name} beside it has others: {len(moved)} images "
                f"change their place; if the file counts, name it (data.split {name}), else move it away",
                [f"image {number}: {one.get(number)} by the one, {other.get(number)} by the other" for number in moved],
            )
    return given


def _uses(splits: dict[str, list[int]], config: DataConfig) -> dict[int, str]:
    trained = {i: "training" for name in config.train_splits if not config.shards for i in splits.get(name, [])}
    return trained | {i: role for role, name in _measurable(config) for i in splits.get(name, [])}


def with_generated(train: Sequence[Picture], pictures: Sequence[Picture], path: Path) -> list[Picture]:
    """The training pictures with a captioner's captions behind their own.

    The file is in COCO's format for caption results, `[{image_id, caption}]`, several of an image allowed. Captions of
    images that are not trained on are left out; those that are added get ids above all others.

    Args:
        train: what is trained on.
        pictures: all there are.
        path: the file.

    Raises:
        DataError: If there is no such file, with every entry that cannot be used, or if no training image has one.
    """
    source = f"{path} (data.generated_captions)"
    rows = _load_json(path, "data.generated_captions", GENERATED_FILE)
    if not isinstance(rows, list):
        raise DataError(f"{source} is no list of {{image_id, caption}}, but a {type(rows).__name__}")
    known = {picture.id for picture in pictures}
    problems = []
    for position, row in enumerate(rows):
        if not isinstance(row, dict) or not is_id(row.get("image_id")) or not is_text(row.get("caption")):
            problems.append(f"[{position}]: expected {{image_id: integer, caption: text}}, found {row!r:.60}")
        elif row["image_id"] not in known:
            problems.append(f"[{position}]: image_id {row['image_id']} is no image of the captions file")
    if problems:
        raise DataError(f"{source} has {len(problems)} unusable entries", problems)
    first = 1 + max(caption_id for picture in pictures for caption_id, _ in picture.captions)
    added = defaultdict(list)
    for caption_id, row in enumerate(rows, first):
        added[row["image_id"]].append((caption_id, row["caption"]))
    if not any(picture.id in added for picture in train):
        raise DataError(f"{source} has captions for {len(added)} images, none of which is trained on")
    return [replace(picture, captions=(*picture.captions, *added.get(picture.id, ()))) for picture in train]


def select(
    pictures: Sequence[Picture], splits: dict[str, list[int]], config: DataConfig
) -> tuple[list[Picture], list[Picture]]:
    """Pictures of the training splits (none if shards are trained on), and those measured that have enough captions.

    What is trained on does not depend on which split is measured.

    Raises:
        DataError: If a split is unknown, an image of a used split has no captions, an image is on two sides, or a side
            is empty.
    """
    train_splits = () if config.shards else config.train_splits
    held_out = config.val_split == VAL and VAL not in splits
    if held_out and config.shards and config.eval_split == VAL:
        raise DataError(
            f"there is no split {VAL!r}, and of data.shards none can be held out: add one to the split file (images "
            "that are in no shard), or name it by data.val_split"
        )
    measured = {VAL: config.val_split, TEST: config.test_split}[config.eval_split]
    named = [*(("data.train_splits", name) for name in train_splits), (f"data.{config.eval_split}_split", measured)]
    unknown = [
        f"{field} {name!r}"
        for field, name in named
        if name not in splits and name not in OPTIONAL_SPLITS and not (held_out and name == VAL)
    ]
    if unknown:
        raise DataError(f"unknown splits; there are: {', '.join(splits)}", unknown)
    by_id = {picture.id: picture for picture in pictures}
    ids = {f"data.train_splits {list(train_splits)}": {i for name in train_splits for i in splits.get(name, [])}}
    ids |= {f"data.{role}_split {name!r}": set(splits.get(name, [])) for role, name in _measurable(config)}
    bare = [
        f"image {image_id}: " + ("no captions" if image_id in by_id else "unknown to the captions file")
        for image_id in sorted({i for name in (*train_splits, measured) for i in splits.get(name, [])})
        if image_id not in by_id or not by_id[image_id].captions
    ]
    if bare:
        raise DataError(f"images of the splits without captions in {config.captions}", bare)
    sides = {side: [picture for picture in pictures if picture.id in found] for side, found in ids.items()}
    refuse_leaks(sides)
    train, val, test = sides.values()
    if held_out and not config.shards:
        val = hold_out(train, config)
        chosen = {picture.id for picture in val}
        train = [picture for picture in train if picture.id not in chosen]
    candidates = val if config.eval_split == VAL else test
    evaluated = [picture for picture in candidates if len(picture.captions) >= config.eval_min_captions]
    if not train and not config.shards:
        raise DataError(f"no training images: data.train_splits {list(config.train_splits)} are empty")
    if not evaluated:
        drawn = held_out and config.eval_split == VAL
        most = max((len(picture.captions) for picture in (train if drawn else candidates)), default=0)
        share = f"data.val_share {config.val_share:g} of {len(train)} training images"
        source = share if drawn else f"data.{config.eval_split}_split {measured!r}"
        raise DataError(
            f"no evaluation images: {source} has {len(candidates)} images, none "
            f"with data.eval_min_captions {config.eval_min_captions} captions or more (the most is {most})"
        )
    return train[: config.max_train_images], evaluated


def hold_out(train: Sequence[Picture], config: DataConfig) -> list[Picture]:
    """`data.val_share` of the training images, of those with enough captions; drawn by their ids alone."""
    able = [picture for picture in train if len(picture.captions) >= config.eval_min_captions]
    able.sort(key=lambda picture: hashlib.sha256(str(picture.id).encode()).digest())
    return able[: round(config.val_share * len(train))]


def _measurable(config: DataConfig) -> list[tuple[SplitName, str]]:
    return [(VAL, config.val_split), (TEST, config.test_split)]


def refuse_leaks(sides: Mapping[str, Sequence[Picture]]) -> None:
    """No image is on two sides: neither its id nor its file.

    Args:
        sides: pictures by where they come from, such as `data.test_split 'test'`.
    """
    for (one, first), (other, second) in combinations(sides.items(), 2):
        ids = {picture.id for picture in first}
        files = {os.path.normpath(picture.file_name): picture.id for picture in first}
        leaks = []
        for picture in second:
            file_name = os.path.normpath(picture.file_name)
            if picture.id in ids:
                leaks.append(f"image {picture.id} ({file_name})")
            elif file_name in files:
                leaks.append(f"image {picture.id}: {file_name} is also image {files[file_name]} there")
        if leaks:
            raise DataError(f"{len(leaks)} images are both in {one} and in {other}; take them out of one", leaks)


def refuse_missing(config: DataConfig, root: Path) -> None:
    """Look for every file and folder that is named, before any is read.

    Raises:
        DataError: With all that do not exist, what is read there, and what is beside them.
    """
    files = [(path, "data.captions", CAPTIONS_FILE) for path in _caption_files(config, root).values()]
    if not root.is_dir():
        del files[1:]  # the rest below it would say the same
    elif config.split is not None:
        files.append((root / config.split, "data.split", SPLIT_FILE))
    if config.generated_captions is not None:
        files.append((config.generated_captions, "data.generated_captions", GENERATED_FILE))
    problems = [
        f"{path} ({field}) does not exist; read is {accepted}; {holding(path.parent, '*.json')}"
        for path, field, accepted in files
        if not path.exists()
    ]
    folders = [(folder, "data.linked_folders") for folder in config.linked_folders]
    if root.is_dir():
        folders.append((root / config.images, "data.images"))
    problems += [
        f"the folder {folder} ({field}) does not exist; {holding(folder.parent, '*/')}"
        for folder, field in folders
        if not folder.is_dir()
    ]
    if problems:
        raise DataError("\n".join(problems))


def _caption_files(config: DataConfig, root: Path) -> dict[str, Path]:
    """By the split that a file is of, or one of `ALL`. An optional one may not be there."""
    if "{split}" not in config.captions:
        return {ALL: root / config.captions}
    needed = dict(_measurable(config))[config.eval_split]
    splits = dict.fromkeys([*(() if config.shards else config.train_splits), config.val_split, config.test_split])
    optional = OPTIONAL_SPLITS | {config.val_split, config.test_split} - ({needed} - {VAL})
    paths = {split: root / config.captions.replace("{split}", split) for split in splits}
    return {split: path for split, path in paths.items() if split not in optional or path.exists()}


def _load_captions(config: DataConfig, root: Path) -> Any:
    """The captions file as it is, or those of the used splits joined, each image tagged with its split."""
    paths = _caption_files(config, root)
    parts = {split: _load_json(path, "data.captions", CAPTIONS_FILE) for split, path in paths.items()}
    if "{split}" not in config.captions:
        return parts[ALL]
    if all(isinstance(part, list) for part in parts.values()):
        return [entry for split, part in parts.items() for entry in _tagged(part, split)]
    joined: dict[str, list[Any]] = {}
    for split, part in parts.items():
        document = to_coco(part, str(paths[split]))
        joined.setdefault("images", []).extend(_tagged(document["images"], split))
        joined.setdefault("annotations", []).extend(document["annotations"])
    return joined


def _tagged(entries: Sequence[Any], split: str) -> list[Any]:
    return [{**entry, "split": split} if isinstance(entry, dict) else entry for entry in entries]


def _carried_splits(pictures: Sequence[Picture]) -> dict[str, list[int]]:
    splits: dict[str, list[int]] = {}
    for picture in pictures:
        if picture.split is not None:
            splits.setdefault(picture.split, []).append(picture.id)
    return splits


def _checked_splits(value: Any, source: str) -> dict[str, list[int]]:
    if not isinstance(value, dict):
        raise DataError(f"{source} (data.split) is no split file: expected {SPLIT_FILE}")
    problems = [f"{name}: {ids!r:.60} is no list" for name, ids in value.items() if not isinstance(ids, list)]
    problems += [
        f"{name}: {image_id!r} is no integer"
        for name, ids in value.items()
        if isinstance(ids, list)
        for image_id in ids
        if not is_id(image_id)
    ]
    if problems:
        raise DataError(f"{source} (data.split) is no split file: expected {SPLIT_FILE}", problems)
    return value


def _load_json(path: Path, field: str, accepted: str) -> Any:
    """Raises DataError with what would be accepted."""
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_each_once if field == "data.split" else None)
    except OSError as error:
        raise DataError(f"{path} ({field}) cannot be read: {error.strerror}; read is {accepted}") from None
    except ValueError as error:
        raise DataError(f"{path} ({field}) is no valid JSON: {error}; read is {accepted}") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of equal keys, JSON would keep the last."""
    names = [name for name, _ in pairs]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is there more than once")
    return dict(pairs)
