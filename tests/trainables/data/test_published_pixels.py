"""`crop` and `stretch` to the pixel as CLIP, ALBEF and BLIP publish them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from trainables.data.cache import decode

# The first digits of the SHA-256 of the results, (row, column, RGB), made with torchvision's transforms as OpenAI's
# clip/clip.py (`_transform`, 224) and ALBEF's dataset/__init__.py (test transform, 384) compose them, and again with
# Pillow alone. Where there are two, the second is of Pillow before 13, which changed the order of its two passes.
PUBLISHED = [
    ((640, 480), {"d6ebd77951f77a6e"}, {"df517b4c075b4a2c"}),
    ((480, 640), {"b0a2ef108b20fddd"}, {"ed8b4c47c8d940cc", "80aaeabf165a1acb"}),
    ((640, 427), {"3d01312574da0933"}, {"74ce1efb9caa9734"}),
    ((640, 211), {"857d8577784955c9"}, {"0fa112575b465117"}),
    ((50, 37), {"e0b74f2ce8c313bd"}, {"2c14d89198490b8f"}),
    ((300, 224), {"dee56ab3dbf5b510"}, {"5e862f186e8a2f9c"}),
    ((100, 224), {"990108c742c072f0"}, {"1f08694ae042b598"}),
    ((640, 425), {"8bd3a2d63fb4fca5"}, {"d00ec897adb6f03a"}),
]


def picture(width: int, height: int) -> np.ndarray:
    """A gradient with noise, by formula, uint8 (height, width, 3)."""
    y, x, c = np.ogrid[:height, :width, :3]
    steps = np.concatenate(
        np.broadcast_arrays(255 * x // (width - 1), 255 * y // (height - 1), 255 * (x + y) // (width + height - 2)), 2
    )
    noise = ((x * 1103515245 + y * 12345 + c * 1013904223 + x * y * 69069) >> 16) & 63
    return (3 * steps // 4 + noise).astype(np.uint8)


@pytest.fixture(params=PUBLISHED, ids=lambda row: "{}x{}".format(*row[0]))
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, set[str], set[str]]:
    (width, height), crop, stretch = request.param
    Image.fromarray(picture(width, height)).save(tmp_path / "a.png")
    return tmp_path / "a.png", crop, stretch


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels.transpose(1, 2, 0)).tobytes()).hexdigest()[:16]


def test_pixels_are_as_published(published: tuple[Path, set[str], set[str]]) -> None:
    path, crop, stretch = published
    assert digest(decode(path, 224, "crop")) in crop
    assert digest(decode(path, 384, "stretch")) in stretch


@pytest.mark.parametrize("pixels", [64, 96, 224])
def test_pixels_are_torchvisions(published: tuple[Path, set[str], set[str]], pixels: int) -> None:
    bicubic = transforms.InterpolationMode.BICUBIC
    scaled = transforms.Resize(pixels, interpolation=bicubic), transforms.CenterCrop(pixels)
    squashed = transforms.Resize((pixels, pixels), interpolation=bicubic)
    with Image.open(published[0]) as image:
        image.load()
    for resize, transform in (("crop", transforms.Compose(scaled)), ("stretch", squashed)):
        expected = np.asarray(transform(image)).transpose(2, 0, 1)
        assert (decode(published[0], pixels, resize) == expected).all()
