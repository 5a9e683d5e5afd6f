"""What one node has prepared, for all others of a cluster: each copies it to its disk, once, and checks its content.

A thing is known by the name of its file or folder, which tells all that shapes it. In the shared place lie its files,
and beside them a record with a hash of every chunk, which is written last: without it, nothing is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from trainables.files import Location, location, opened

CHUNK = 32 << 20
"""Bytes that are read, checked and written at once."""

THREADS = 8
"""Chunks under way; a bucket gives each connection only a part of what a node can take."""

READS = 3
"""Of a chunk that does not arrive as it was given."""

Record = dict[str, Any]
"""`at`: a folder; `files`: hashes of the chunks of each, by name below it, which is empty where the thing is a file."""

_shared: ContextVar[Location | None] = ContextVar("shared", default=None)
copied_bytes = 0
"""That this process has brought."""


class Damaged(Exception):
    """A chunk is not what was given."""


@contextmanager
def sharing(place: str | None) -> Iterator[None]:
    """What is prepared meanwhile is looked for there first, and given there afterwards.

    Args:
        place: a folder or URL that all nodes see; None: each prepares for itself.
    """
    token = _shared.set(None if place is None else location(place))
    try:
        yield
    finally:
        _shared.reset(token)


def offered(path: Path) -> bool:
    """Whether some node has given what belongs at this path."""
    return _read_record(path.name) is not None


def bring(path: Path) -> bool:
    """Copy what belongs at this path from the shared place; it appears whole or not at all. Its lock has to be held.

    What is damaged there for good is forgotten, so that it is made and given again.

    Returns:
        Whether it is here now.
    """
    global copied_bytes
    record, shared = _read_record(path.name), _shared.get()
    if record is None or shared is None:
        return False
    part = path.with_name(f"{path.name}.brought")
    _remove(part)
    try:
        for name, chunks in record["files"].items():
            target = part / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(shared / path.name / record["at"] / (name or "whole"), target, chunks)
    except (Damaged, FileNotFoundError):
        _remove(part)
        (shared / f"{path.name}.json").unlink(missing_ok=True)
        return False
    copied_bytes += sum(file.stat().st_size for file in _files(part).values())
    _remove(path)
    os.replace(part, path)
    return True


def give(path: Path) -> None:
    """Copy what was made at this path to the shared place. Its lock has to be held.

    Where another node was faster, its folder is taken instead of this one: no two trainings of a model are the same to
    the bit.
    """
    shared = _shared.get()
    if shared is None or (_read_record(path.name) is not None and (path.is_file() or bring(path))):
        return
    record: Record = {"at": uuid.uuid4().hex, "files": {}}
    for name, file in _files(path).items():
        files, to = opened(shared / path.name / record["at"] / (name or "whole"))
        if isinstance(shared, Path):
            Path(to).parent.mkdir(parents=True, exist_ok=True)
        hashes = record["files"][name] = []
        with file.open("rb") as source, files.open_output_stream(to) as stream:
            while chunk := source.read(CHUNK):
                hashes.append(hashlib.sha256(chunk).hexdigest())
                stream.write(chunk)
    _write_record(shared, path.name, record)


def _files(path: Path) -> dict[str, Path]:
    """By name below the path; a file has none."""
    if path.is_file():
        return {"": path}
    return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}


def _copy(source: Location, target: Path, hashes: list[str]) -> None:
    files, path = opened(source)
    with target.open("wb") as to, files.open_input_file(path) as stream, ThreadPoolExecutor(THREADS) as pool:

        def chunk(number: int) -> None:
            for _ in range(READS):
                content = stream.read_at(CHUNK, number * CHUNK)
                if hashlib.sha256(content).hexdigest() == hashes[number]:
                    os.pwrite(to.fileno(), content, number * CHUNK)
                    return
            raise Damaged(f"{source}: chunk {number} is not what was given")

        for _ in pool.map(chunk, range(len(hashes))):
            pass


def _read_record(name: str) -> Record | None:
    shared = _shared.get()
    if shared is None:
        return None
    try:
        return dict(json.loads((shared / f"{name}.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return None


def _write_record(shared: Location, name: str, record: Record) -> None:
    text, path = json.dumps(record), shared / f"{name}.json"
    if isinstance(path, Path):
        part = path.with_name(f"{path.name}.{record['at']}")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    else:
        path.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
