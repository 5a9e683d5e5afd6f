"""Odd image files, and the shared array they end up in."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainables.data import DataError, cache
from trainables.data.cache import ImageFile, decode, load_pixels, locate, resized

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def colour_at(pixels: np.ndarray, row: int, column: int) -> tuple[int, ...]:
    return tuple(pixels[:, row, column].tolist())


def near(pixels: np.ndarray, colour: tuple[int, int, int], within: int = 4) -> bool:
    """Whether the whole image has one colour."""
    return int(np.abs(pixels.astype(int) - np.reshape(colour, (3, 1, 1))).max()) <= within


def write_files(folder: Path, count: int) -> list[ImageFile]:
    folder.mkdir()
    for position in range(count):
        Image.new("RGB", (20, 20), (position, 0, 0)).save(folder / f"{position}.png")
    return locate(folder, [f"{position}.png" for position in range(count)])


def save(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    image.save(path, **options)
    return decode(path, 16, "crop")


def test_grey(tmp_path: Path) -> None:
    assert near(save(Image.new("L", (20, 20), 77), tmp_path / "a.png"), (77, 77, 77), 0)
    assert near(save(Image.new("1", (20, 20), 1), tmp_path / "b.png"), WHITE, 0)
    assert near(save(Image.new("LA", (20, 20), (0, 0)), tmp_path / "c.png"), WHITE, 0)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit(tmp_path: Path, suffix: str) -> None:
    levels = np.full((20, 20), 0x4D20, dtype=np.uint16)
    levels[:, 10:] = 0xFFFF
    pixels = save(Image.fromarray(levels), tmp_path / f"a.{suffix}")
    assert colour_at(pixels, 8, 2) == (0x4D,) * 3
    assert colour_at(pixels, 8, 13) == WHITE


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    pixels = save(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), tmp_path / f"a.{suffix}")
    assert near(pixels, RED, 30)


def test_transparency_is_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 10, 20))
    pixels = save(image, tmp_path / "a.png")
    assert (colour_at(pixels, 8, 2), colour_at(pixels, 8, 13)) == (RED, WHITE)
    half = save(Image.new("RGBA", (20, 20), (0, 0, 255, 51)), tmp_path / "b.png")
    assert near(half, (204, 204, 255), 1)
    keyed = Image.new("RGB", (20, 20), GREEN)
    keyed.paste(BLUE, (0, 0, 10, 20))
    pixels = save(keyed, tmp_path / "c.png", transparency=GREEN)
    assert (colour_at(pixels, 8, 2), colour_at(pixels, 8, 13)) == (BLUE, WHITE)


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, *BLUE])
    assert near(save(image, tmp_path / "a.png"), BLUE, 0)
    assert near(save(image, tmp_path / "a.gif"), BLUE, 0)
    assert near(save(image, tmp_path / "b.png", transparency=1), WHITE, 0)


@pytest.mark.parametrize(
    ("orientation", "red_side"),
    [
        (1, "left"),
        (2, "right"),
        (3, "right"),
        (4, "left"),
        (5, "top"),
        (6, "top"),
        (7, "bottom"),
        (8, "bottom"),
    ],
)
def test_exif_orientation(tmp_path: Path, orientation: int, red_side: str) -> None:
    image = Image.new("RGB", (64, 64), BLUE)
    image.paste(RED, (0, 0, 32, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = save(image, tmp_path / "a.jpg", exif=exif, quality=95)
    red = pixels[0].astype(int) > 128
    sides = {"left": red[:, 2], "right": red[:, 13], "top": red[2], "bottom": red[13]}
    assert [side for side, values in sides.items() if values.all()] == [red_side]
    assert red.mean() == pytest.approx(0.5, abs=0.07)


def test_exif_turns_before_the_crop(tmp_path: Path) -> None:
    image = Image.new("RGB", (96, 32), GREEN)
    image.paste(RED, (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    pixels = decode(tmp_path / "a.png", 24, "stretch")
    assert (colour_at(pixels, 1, 12), colour_at(pixels, 12, 1)) == (RED, GREEN)


def test_crop_and_stretch(tmp_path: Path) -> None:
    image = Image.new("RGB", (96, 32), GREEN)
    image.paste(RED, (0, 0, 32, 32))
    image.paste(BLUE, (64, 0, 96, 32))
    for name, turned in (("wide", image), ("tall", image.transpose(Image.Transpose.ROTATE_270))):
        turned.save(tmp_path / f"{name}.png")
        assert near(decode(tmp_path / f"{name}.png", 24, "crop")[:, 2:-2, 2:-2], GREEN, 0)
        stretched = decode(tmp_path / f"{name}.png", 24, "stretch")
        line = stretched[:, 12] if name == "wide" else stretched[:, :, 12]
        assert [tuple(line[:, k].tolist()) for k in (3, 12, 20)] == [RED, GREEN, BLUE]


def test_extreme_shapes(tmp_path: Path) -> None:
    assert near(save(Image.new("RGB", (1, 1), RED), tmp_path / "a.png"), RED, 0)
    assert near(save(Image.new("RGB", (5000, 1), RED), tmp_path / "b.png"), RED, 0)
    long = Image.new("RGB", (1, 40_000), RED)
    long.paste(GREEN, (0, 19_000, 1, 21_000))
    assert near(save(long, tmp_path / "c.png"), GREEN, 0)
    assert resized(long, 512, "crop").size == (512, 512)  # whole, it would be 512 x 20 million pixels


def test_bicubic(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, size=(40, 40, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    for resize in ("crop", "stretch"):
        assert (decode(tmp_path / "a.png", 16, resize) == expected).all()


def bomb(path: Path, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(side // 8 * side // 1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_all_bad_files_in_one_message(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "good.jpg")
    whole = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "folder.jpg").mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(folder / "float.tif")
    bomb(folder / "bomb.png", 40_000)
    bomb(folder / "small_bomb.png", 10_000)  # Pillow itself would only warn
    Image.new("RGB", (20, 20)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:50])
    reasons = {
        "truncated.jpg": "truncated",
        "empty.jpg": "empty file",
        "text.jpg": "no image",
        "folder.jpg": "IsADirectoryError",
        "float.tif": "floating-point",
        "bomb.png": "DecompressionBomb",
        "small_bomb.png": "DecompressionBomb",
        "cut.png": ":",
        "missing.jpg": "no such file",
    }
    files = locate(folder, ["good.jpg", *reasons])
    path = tmp_path / "images.npy"
    with pytest.raises(DataError) as caught:
        load_pixels(files, 16, "crop", path)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"9 of 10 image files cannot be used, such as {folder.resolve() / 'truncated.jpg'}; JPEG")
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert line.strip().startswith(f"{name}: ")
        assert reason in line
    assert not path.exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_cache_content_and_reuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_files(tmp_path / "images", 12)
    path = tmp_path / "images.npy"
    built = load_pixels(files, 16, "crop", path)
    assert built.shape == (12, 3, 16, 16)
    assert built.dtype == np.uint8
    assert built[:, 0].mean((1, 2)).tolist() == list(range(12))
    assert isinstance(built, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        built[0] = 1
    monkeypatch.setattr(cache, "decode", lambda *_: pytest.fail("decoded again"))
    assert (load_pixels(files, 16, "crop", path) == built).all()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"garbage" * 1000),
        lambda path: np.save(path, np.zeros((12, 3, 8, 8), np.uint8)),
        lambda path: np.save(path, np.zeros((12, 3, 16, 16), np.float32)),
    ],
    ids=["cut", "empty", "garbage", "shape", "type"],
)
def test_damaged_cache_is_rebuilt(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    files = write_files(tmp_path / "images", 12)
    path = tmp_path / "images.npy"
    load_pixels(files, 16, "crop", path)
    damage(path)
    assert load_pixels(files, 16, "crop", path)[:, 0].mean((1, 2)).tolist() == list(range(12))


def test_killed_build_is_begun_again(tmp_path: Path) -> None:
    files = write_files(tmp_path / "images", 12)
    (tmp_path / "images.npy.tmp").write_bytes(b"left behind")
    (tmp_path / "images.npy.lock").touch()
    assert load_pixels(files, 16, "crop", tmp_path / "images.npy")[:, 0].mean((1, 2)).tolist() == list(range(12))


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = write_files(tmp_path / "images", 2)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"need 0 MB.*cache_dir"):
        load_pixels(files, 16, "crop", tmp_path / "images.npy")
    assert not list(tmp_path.glob("*.tmp"))


BUILDER = """
import sys, time
from pathlib import Path
from trainables.data import cache
from trainables.data.cache import load_pixels, locate

folder, path, log = map(Path, sys.argv[1:])
decode = cache.decode

def slow(*arguments):
    time.sleep(0.01)
    with log.open("a") as file:
        file.write("x")
    return decode(*arguments)

cache.decode = slow
print("ready", flush=True)
sys.stdin.readline()
files = locate(folder, [f"{k}.png" for k in range(60)])
print(load_pixels(files, 16, "crop", path)[:, 0].mean((1, 2)).tolist() == list(range(60)))
"""


def test_two_processes_build_once(tmp_path: Path) -> None:
    write_files(tmp_path / "images", 60)
    command = [sys.executable, "-c", BUILDER, *(str(tmp_path / n) for n in ("images", "images.npy", "log"))]
    builders = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for builder in builders:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "ready\n"
    for builder in builders:
        assert builder.stdin is not None
        builder.stdin.write("\n")
        builder.stdin.flush()
    assert [builder.communicate(timeout=60)[0] for builder in builders] == ["True\n", "True\n"]
    assert (tmp_path / "log").stat().st_size == 60
    assert not list(tmp_path.glob("*.tmp"))
