"""Image files -> one memory-mapped uint8 array, decoded once and shared by every process of a node."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BytesIO
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trainables.data.depot import bring, give
from trainables.data.errors import DataError

VERSION = 2
"""Part of the data hash: raise it when the same file would decode to other pixels."""

MISSING = -1

Resize = Literal["stretch", "crop"]

ELONGATED = 100
"""Of images longer than so many times their width, the ends are cut off first: scaled, they would fill the memory."""


class ImageFile(NamedTuple):
    """An image file below the image folder; `size` is its length in bytes, or `MISSING`.

    With an `offset` it is that range of bytes of the file at `path`, a shard. `stamp` tells when the file at `path` was
    last changed: no program can set it back.
    """

    name: str
    path: str
    size: int
    stamp: int
    offset: int | None = None

    def source(self) -> str | BytesIO:
        """What Pillow opens."""
        return self.path if self.offset is None else BytesIO(self.read())

    def read(self) -> bytes:
        """The image, as it is encoded; nothing where it cannot be read."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset or 0)
                return file.read(self.size)
        except OSError:
            return b""


def locate(folder: Path, names: Sequence[str], linked: Sequence[Path] = ()) -> list[ImageFile]:
    """Where the images of an annotation file are, without opening them.

    Annotation files come from outside: no name may lead out of the folder. The folder itself may be a link.

    Args:
        folder: of the images.
        names: below it.
        linked: folders elsewhere that links below it may lead to.

    Raises:
        DataError: With every name that leaves it.
    """
    base = os.path.realpath(folder)
    allowed = [base, *map(os.path.realpath, linked)]

    def inside(path: str) -> bool:
        return any(os.path.commonpath([place, path]) == place for place in allowed)

    @cache  # one resolution a directory, one lstat a file
    def directory(name: str) -> tuple[str, bool]:
        path = os.path.join(base, name)
        with contextlib.suppress(OSError, ValueError):
            path = os.path.realpath(path)
        return path, inside(path)

    problems, files = [], []
    links: Counter[str] = Counter()
    for name in names:
        if name.startswith("/") or (".." in name and ".." in PurePath(name).parts):
            problems.append(f"{name}: absolute, or with '..'")
            continue
        parent, _, last = name.rpartition("/")
        place, within = directory(parent)
        path, size, stamp = f"{place}/{last}", MISSING, 0
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                path = os.path.realpath(path)
                within = inside(path)
                status = os.lstat(path)
            size, stamp = status.st_size, status.st_ctime_ns
        except (OSError, ValueError):
            pass  # told when it is decoded
        if within:
            files.append(ImageFile(name, path, size, stamp))
        else:
            links[_link(base, name)] += 1
    problems += [f"{link} ({count} images)" for link, count in links.items()]
    if problems:
        advice = "; if the links are meant, name the folders they lead to in data.linked_folders" if links else ""
        raise DataError(f"file names that leave the image folder {folder}{advice}", problems)
    return files


def _link(base: str, name: str) -> str:
    """The first link on the way to a file, and where it leads."""
    path = base
    for part in PurePath(name).parts:
        path = os.path.join(path, part)
        if os.path.islink(path):
            break
    return f"{os.path.relpath(path, base)} is a link to {os.path.realpath(path)}"


def content_digest(files: Sequence[ImageFile], folder: Path) -> str:
    """Hash of what all files hold, the same on every machine.

    They are read once: where names, lengths and stamps are what they were, so is the content.

    Args:
        files: from `locate` or from shards.
        folder: where the hash is kept.
    """

    def read() -> str:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = pool.map(lambda file: hashlib.sha256(file.read()).digest(), files)
            return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    lines = [f"{file.path}\0{file.size}\0{file.stamp}\0{file.offset}\n" for file in files]
    known = hashlib.sha256("".join(lines).encode(errors="surrogateescape"))
    return remembered(folder / f"content-{known.hexdigest()[:16]}", read)


def remembered(path: Path, make: Callable[[], str]) -> str:
    """The text at `path`, which is made if there is none; its name tells all that shapes it."""
    with locked(path):
        if not path.exists() and not bring(path):
            part = path.with_name(f"{path.name}.tmp")
            part.write_text(make(), encoding="utf-8")
            os.replace(part, path)
            give(path)
    return path.read_text(encoding="utf-8")


def remembered_array(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array at `path`, which is made if there is none or it is damaged; its name tells all that shapes it."""
    with locked(path):
        for there in (path.exists, lambda: bring(path)):
            with contextlib.suppress(OSError, EOFError, ValueError):
                if there():
                    return np.asarray(np.load(path, allow_pickle=False))
        part = path.with_name(f"{path.name}.tmp.npy")
        np.save(part, made := make())
        os.replace(part, path)
        give(path)
    return made


def load_pixels(files: Sequence[ImageFile], pixels: int, resize: Resize, path: Path) -> np.ndarray:
    """The images as a read-only memory map, uint8 (files, 3, pixels, pixels).

    The file is built if it is missing or damaged. Any number of processes may call this at once: one builds,
    the others wait and map its file.

    Args:
        files: From `locate`.
        pixels: Height and width of the result.
        resize: See `resized`.
        path: The cache file; its name must depend on everything that shapes the content.

    Raises:
        DataError: With every file that cannot be decoded, and why.
    """
    shape = (len(files), 3, pixels, pixels)
    found = _open(path, shape)
    if found is not None:
        return found
    with locked(path):
        found = _open(path, shape)
        if found is None and bring(path):
            found = _open(path, shape)
        if found is None:
            _build(files, resize, path, shape)
            give(path)
            found = _open(path, shape)
    if found is None:
        raise OSError(f"{path} was written but does not read back; is the file system of the cache sound?")
    return found


@contextlib.contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Hold the lock of `path` (a file beside it), which ends with the process at the latest.

    Args:
        path: of what is made.
        how: exclusive, or another operation of `fcntl.flock`. With `LOCK_NB`, what others hold is not waited for.

    Yields:
        Whether it is held.
    """
    with path.with_name(f"{path.name}.lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            yield False
        else:
            yield True


def decode(source: Path | str | BytesIO, pixels: int, resize: Resize) -> np.ndarray:
    """One image as uint8 (3, pixels, pixels): upright, RGB, transparency on white, then `resized`.

    Raises:
        Exception: Whatever Pillow finds wrong with the file; its plugins raise nearly anything.
    """
    with Image.open(source) as image:
        upright = _rgb(ImageOps.exif_transpose(image))
    return np.asarray(resized(upright, pixels, resize)).transpose(2, 0, 1)


def resized(image: Image.Image, pixels: int, resize: Resize) -> Image.Image:
    """A square of an RGB image, by Pillow's bicubic filter, to the pixel as published.

    `stretch` scales both sides (ALBEF, BLIP, SigLIP). `crop` scales the short side and cuts out the centre (CLIP): the
    long side is rounded down to whole pixels, and the middle to even ones, as torchvision's `Resize` and `CenterCrop`.
    """
    if resize == "stretch":
        return image.resize((pixels, pixels), Image.Resampling.BICUBIC)
    short = min(image.size)
    longest = ELONGATED * short
    if max(image.size) > longest:
        image = ImageOps.fit(image, (min(image.width, longest), min(image.height, longest)))
    width, height = (int(pixels * side / short) for side in image.size)
    left, top = round((width - pixels) / 2), round((height - pixels) / 2)
    scaled = image if short == pixels else image.resize((width, height), Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + pixels, top + pixels))


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown; convert it to 8 bits")
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits at 255; the upper byte is what it takes of 16-bit colours.
        levels = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached array, or None if there is none or it is not what was asked for."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError):
        return None
    return found if found.shape == shape and found.dtype == np.uint8 else None


def _build(files: Sequence[ImageFile], resize: Resize, path: Path, shape: tuple[int, ...]) -> None:
    """Decode every file into `path`; needs its lock."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(temporary)

        def fill(position: int) -> str | None:
            file = files[position]
            try:
                array[position] = decode(file.source(), shape[-1], resize)
            except Exception as error:
                return f"{file.name}: {_reason(file, error)}"
            return None

        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
            # Pillow only warns of a decompression bomb up to twice its limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            found = list(pool.map(fill, range(len(files))))
            problems = [problem for problem in found if problem]
        if problems:
            example = next(file for file, problem in zip(files, found, strict=True) if problem)
            raise DataError(
                f"{len(problems)} of {len(files)} image files cannot be used, such as {example.path}; JPEG, PNG, WebP "
                "and what else Pillow opens can",
                problems,
            )
        array.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    """Take the disk space now: on a full disk, a write through the memory map would kill the process."""
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"decoded images need {size / 1e6:.0f} MB; free space, or choose another cache_dir"
            raise OSError(error.errno, message, str(path)) from None
    except AttributeError:
        return  # not on macOS


def _reason(file: ImageFile, error: Exception) -> str:
    if file.size == MISSING:
        return "no such file"
    if file.size == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "no image Pillow knows"
    return f"{type(error).__name__}: {error}"
