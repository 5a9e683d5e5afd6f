"""Where files lie that outlive a process: on a disk, or in a bucket by URL.

`UrlPath` is as much of `pathlib.Path` as is used here, over `pyarrow.fs`. Objects differ from files: each is written
whole or not at all, none is added to, and folders are there if something is in them.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, total_ordering
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import PlainSerializer, PlainValidator

from trainables.config.fields import expanded
from trainables.object_storage import ATTEMPTS, FIRST_ATTEMPTS, errors_of, explained, file_system

SCHEMES = ("s3", "gs")
"""Of URLs that files can lie at."""

POSSIBLE = "give a path, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"


class Stat(NamedTuple):
    """Of an object."""

    st_mtime_ns: int
    st_size: int


@total_ordering
class UrlPath:
    """An object or a folder of objects in a bucket.

    Args:
        url: checked, see `location`.
    """

    def __init__(self, url: str) -> None:
        scheme, _, path = url.partition("://")
        self._scheme, self._path = scheme, PurePosixPath(path)

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path}"

    def __repr__(self) -> str:
        return f"UrlPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlPath) and str(self) == str(other)

    def __lt__(self, other: UrlPath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> UrlPath:
        return self._at(self._path / name)

    def _at(self, path: PurePosixPath) -> UrlPath:
        return UrlPath(f"{self._scheme}://{path}")

    @property
    def bucket(self) -> str:
        """Its name."""
        return self._path.parts[0]

    @property
    def name(self) -> str:
        """As of a path."""
        return self._path.name

    @property
    def stem(self) -> str:
        """As of a path."""
        return self._path.stem

    @property
    def suffix(self) -> str:
        """As of a path."""
        return self._path.suffix

    @property
    def parent(self) -> UrlPath:
        """As of a path; of a bucket, itself."""
        return self._at(self._path.parent) if len(self._path.parts) > 1 else self

    @property
    def parents(self) -> Sequence[UrlPath]:
        """As of a path, up to the bucket."""
        return [self._at(path) for path in list(self._path.parents)[:-1]]

    def with_name(self, name: str) -> UrlPath:
        """As of a path."""
        return self._at(self._path.with_name(name))

    def with_suffix(self, suffix: str) -> UrlPath:
        """As of a path."""
        return self._at(self._path.with_suffix(suffix))

    def resolve(self) -> UrlPath:
        """A URL means the same everywhere."""
        return self

    def as_uri(self) -> str:
        """The URL."""
        return str(self)

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        return bool(self._info().type)

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return bool(self._info().is_file)

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        info = self._info()
        return bool(info.type) and not info.is_file

    def stat(self) -> Stat:
        """Of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return Stat(int(info.mtime_ns), int(info.size))

    def read_bytes(self) -> bytes:
        """Of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        files, path = opened(self)
        with errors_of(str(self)), files.open_input_stream(path) as stream:
            return bytes(stream.read())

    def read_text(self, encoding: str) -> str:
        """Of an object, as of a file."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Put the object: all of it or nothing, over what is there."""
        files, path = opened(self)
        with errors_of(str(self)), files.open_output_stream(path) as stream:
            stream.write(content)

    def write_text(self, text: str, encoding: str) -> None:
        """Put the object, as `write_bytes`."""
        self.write_bytes(text.encode(encoding))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        if missing_ok and not self.is_file():
            return
        files, path = opened(self)
        with errors_of(str(self)):
            files.delete_file(path)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: folders are there by what is in them."""

    def iterdir(self) -> Iterator[UrlPath]:
        """What is directly below; nothing where nothing is."""
        return (self / path for path in self._below(recursive=False))

    def glob(self, pattern: str) -> Iterator[UrlPath]:
        """As of a path: `*` within a name, `**` for any folders between."""
        parts = pattern.split("/")
        fixed = next((place for place, part in enumerate(parts) if "*" in part), len(parts) - 1)
        start, rest = self / "/".join(parts[:fixed]), parts[fixed:]
        folders = [r"(?:.+/)?" if part == "**" else _name_pattern(part) + "/" for part in rest[:-1]]
        wanted = re.compile("".join([*folders, _name_pattern(rest[-1])]))
        return (start / path for path in start._below(recursive=len(rest) > 1) if wanted.fullmatch(path))

    def _below(self, recursive: bool) -> list[str]:
        from pyarrow.fs import FileSelector

        files, path = opened(self)
        with errors_of(str(self)):
            found = files.get_file_info(FileSelector(path, allow_not_found=True, recursive=recursive))
        return sorted(posixpath.relpath(info.path, path) for info in found)

    def _info(self) -> Any:
        files, path = opened(self)
        with errors_of(str(self)):
            return files.get_file_info(path)


Location = Path | UrlPath
"""Of a file or folder."""


def location(value: object) -> Location:
    """A path, with `~` and `$NAME` as a shell reads them, or a URL.

    Raises:
        ValueError: nothing can lie there.
    """
    if isinstance(value, Path | UrlPath):
        return value
    text = str(expanded(value))
    scheme, slashes, rest = text.partition("://")
    if not slashes and text.startswith(tuple(f"{known}:" for known in SCHEMES)):
        raise ValueError(f"{text} is neither a path nor a URL with a bucket; {POSSIBLE}")
    if not slashes:
        return Path(text)
    if scheme == "file" and rest.startswith("/"):
        return Path(rest)
    if scheme not in SCHEMES:
        raise ValueError(f"nothing can be kept at {scheme}://; {POSSIBLE}")
    parts = urlsplit(text)
    if "@" in parts.netloc or "?" in text or "#" in text:
        raise ValueError(
            f"a URL here is {scheme}://BUCKET/PREFIX and no more: keys, endpoint and region are taken from the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION), ~/.aws, or the "
            "machine's role"
        )
    if not parts.netloc:
        raise ValueError(f"{text} names no bucket; {POSSIBLE}")
    if ".." in PurePosixPath(rest).parts:
        raise ValueError("a URL here has no '..'")
    return UrlPath(text)


PlaceOrUrl = Annotated[Location, PlainValidator(location), PlainSerializer(str, when_used="json")]
"""A field with a path or a URL."""


def below(folder: Location, pattern: str) -> list[Location]:
    """What is there of the pattern, in order of the names."""
    return sorted(folder.glob(pattern), key=str)


def opened(place: Location | str, attempts: int = ATTEMPTS) -> tuple[Any, str]:
    """A `pyarrow.fs.FileSystem`, and the place in it."""
    from pyarrow.fs import LocalFileSystem

    place = location(place)
    if isinstance(place, Path):
        return LocalFileSystem(), str(place.resolve())
    scheme, _, path = str(place).partition("://")
    try:
        return file_system(scheme, place.bucket, attempts), path
    except OSError as error:
        raise explained(error, str(place)) from None


def refuse_unusable(folder: UrlPath) -> None:
    """Put an object into the folder and delete it.

    Raises:
        OSError: there is no such bucket, nobody answers, or it may not be written.
    """
    files, path = opened(folder / ".writable", FIRST_ATTEMPTS)
    with errors_of(str(folder)):
        with files.open_output_stream(path) as stream:
            stream.write(b"")
        files.delete_file(path)


def ray_storage(place: Location | str) -> dict[str, Any]:
    """Fields of Ray's run configuration that have it keep its files there."""
    files, path = opened(place)
    return {"storage_path": path, "storage_filesystem": None if isinstance(location(place), Path) else files}


def remove_tree(folder: Location) -> None:
    """Delete the folder with all that is in it, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.is_dir():
        files, path = opened(folder)
        with errors_of(str(folder)):
            files.delete_dir(path)


def move(source: Location, to: Location) -> None:
    """Move a file or folder within one storage. Objects are copied and then deleted."""
    if isinstance(source, Path) or isinstance(to, Path):
        assert isinstance(source, Path), "from one storage to another"
        assert isinstance(to, Path), "from one storage to another"
        source.rename(to)
        return
    files, _ = opened(source)
    within = source.is_dir()
    with errors_of(str(source)):
        for name in source._below(recursive=True) if within else [""]:
            one, other = (source / name, to / name) if name else (source, to)
            if one.is_file():
                files.copy_file(opened(one)[1], opened(other)[1])
    if within:
        remove_tree(source)
    else:
        source.unlink()


@contextmanager
def local_copy(place: Location) -> Iterator[Path]:
    """A file or folder to read from the disk, under its own name; a copy of it is gone afterwards."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / place.name
        fetch(place, copy)
        yield copy


def held_copy(place: Location) -> Path:
    """The same for as long as this process needs it: the last two places have a copy."""
    return place if isinstance(place, Path) else Path(_held(place).name) / place.name


@lru_cache(maxsize=2)
def _held(place: UrlPath) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # removed when nobody holds it
    fetch(place, Path(folder.name) / place.name)
    return folder


def fetch(place: UrlPath, to: Path) -> None:
    """Copy an object, or a folder of them, to the disk."""
    from pyarrow.fs import LocalFileSystem, copy_files

    files, path = opened(place)
    if not place.is_file():
        to.mkdir(parents=True, exist_ok=True)
    with errors_of(str(place)):
        copy_files(path, str(to), source_filesystem=files, destination_filesystem=LocalFileSystem())


@contextmanager
def filled(folder: Location) -> Iterator[Path]:
    """A folder on the disk to put files in, which are in `folder` afterwards."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                (folder / path.relative_to(scratch).as_posix()).write_bytes(path.read_bytes())


def _name_pattern(part: str) -> str:
    return re.escape(part).replace(r"\*", "[^/]*")
