"""Corruptions: what each does, by hand and on real photographs."""

from __future__ import annotations

import colorsys
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainables.data.corruptions import KINDS, Kind, corrupt

RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "fog"}
RANDOM |= {"elastic_transform"}
UNEVEN = {"saturate", "fog", "snow"}  # their published severities do not rise in pixels at every step


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def smooth_image(size: int) -> np.ndarray:
    """The same landscape of colours at any size."""
    row, column = np.indices((size, size)) / size
    return np.stack([0.5 + 0.4 * np.sin(9 * row + 3 * c) * np.cos(7 * column + c) for c in range(3)], axis=-1)


@pytest.fixture(scope="module")
def photos(real_data: Path) -> list[Image.Image]:
    folder = real_data / "coco_small"
    names = [image["file_name"] for image in json.loads((folder / "captions.json").read_text())["images"]][::180]
    return [Image.open(folder / "images" / name).convert("RGB").resize((256, 256)) for name in names]


def at_size(photos: list[Image.Image], size: int) -> list[np.ndarray]:
    return [np.asarray(photo.resize((size, size))) / 255 for photo in photos]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [33, 64])
def test_range_shape_and_determinism(photos: list[Image.Image], kind: Kind, size: int) -> None:
    image = at_size(photos[:1], size)[0]
    before = image.copy()
    for severity in range(1, 6):
        got = corrupt(image, kind, severity, rng())
        assert got.shape == image.shape
        assert got.min() >= 0
        assert got.max() <= 1
        np.testing.assert_array_equal(got, corrupt(image, kind, severity, rng()))
        np.testing.assert_array_equal(image, before)
        assert (got != corrupt(image, kind, severity, rng(1))).any() == (kind in RANDOM)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNEVEN])
@pytest.mark.parametrize("size", [64, 224])
def test_photographs_are_spoiled_more_at_every_severity(photos: list[Image.Image], kind: Kind, size: int) -> None:
    images = at_size(photos, size)[: 9 if size == 64 else 3]
    distance = [
        np.mean([np.abs(corrupt(image, kind, severity, rng(i)) - image).mean() for i, image in enumerate(images)])
        for severity in range(1, 6)
    ]
    assert (np.diff(distance) > 0).all(), distance
    assert distance[-1] > 0.04


@pytest.mark.parametrize("kind", sorted(UNEVEN))
def test_the_worst_severity_spoils_more_than_the_mildest(photos: list[Image.Image], kind: Kind) -> None:
    distance = [
        np.mean([np.abs(corrupt(image, kind, severity, rng(i)) - image).mean() for i, image in enumerate(images)])
        for images in [at_size(photos, 64)]
        for severity in (1, 5)
    ]
    assert distance[1] > 1.1 * distance[0]


def test_noise_has_the_published_strength() -> None:
    grey = np.full((200, 200, 3), 0.5)
    assert (corrupt(grey, "gaussian_noise", 1, rng()) - grey).std() == pytest.approx(0.08, rel=0.02)
    assert (corrupt(grey, "speckle_noise", 1, rng()) - grey).std() == pytest.approx(0.5 * 0.15, rel=0.02)
    shot = corrupt(grey, "shot_noise", 1, rng())
    assert shot.mean() == pytest.approx(0.5, rel=0.01)
    assert shot.std() == pytest.approx((0.5 / 60) ** 0.5, rel=0.02)
    impulse = corrupt(grey, "impulse_noise", 5, rng())
    assert (impulse == 0).mean() == pytest.approx(0.27 / 2, rel=0.03)
    assert (impulse == 1).mean() == pytest.approx(0.27 / 2, rel=0.03)


@pytest.mark.parametrize("kind", ["brightness", "saturate"])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_colours_change_as_in_hsv(kind: Kind, severity: int) -> None:
    image = rng().uniform(0.01, 1, (8, 8, 3))
    got = corrupt(image, kind, severity, rng())
    factor, added = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    for before, after in zip(image.reshape(-1, 3), got.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        if kind == "brightness":
            value = min(1, value + 0.1 * severity)
        else:
            saturation = min(1, factor * saturation + added)
        np.testing.assert_allclose(after, colorsys.hsv_to_rgb(hue, saturation, value), atol=1e-9)


def test_contrast_by_hand() -> None:
    image = np.stack([np.array([[0.2, 0.6], [0.2, 0.6]])] * 3, axis=-1)
    np.testing.assert_allclose(corrupt(image, "contrast", 1, rng())[0, :, 0], [0.4 - 0.08, 0.4 + 0.08])


@pytest.mark.parametrize(
    "kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur", "elastic_transform"]
)
@pytest.mark.parametrize("size", [32, 100])
def test_blurs_and_bends_leave_one_colour_alone(kind: Kind, size: int) -> None:
    image = np.broadcast_to([0.2, 0.5, 0.9], (size, size, 3))
    for severity in (1, 5):
        np.testing.assert_allclose(corrupt(image, kind, severity, rng()), image, atol=1e-9)


def test_kernels_have_their_form() -> None:
    """What blurs make of one bright pixel in the middle, at the size the constants are for."""
    point = np.zeros((225, 225, 3))
    point[112, 112] = 1
    row, column = np.indices((225, 225)) - 112
    disk = corrupt(point, "defocus_blur", 3, rng())[..., 0]
    assert (disk > 1e-6).sum() == pytest.approx(np.pi * 6**2, rel=0.3)  # radius 6
    assert disk.max() == pytest.approx(1 / (np.pi * 6**2), rel=0.03)
    spread = corrupt(point, "gaussian_blur", 3, rng())[..., 0]
    assert (spread * row**2).sum() == pytest.approx(3**2, rel=0.02)
    trail = corrupt(point, "motion_blur", 3, rng())[..., 0]
    assert trail.sum() == pytest.approx(1)
    reached = np.hypot((trail * row).sum(), (trail * column).sum())
    steps = np.arange(31)
    weights = np.exp(-((steps / 8) ** 2) / 2)
    assert reached == pytest.approx((steps * weights).sum() / weights.sum(), rel=0.02)


@pytest.mark.parametrize("kind", ["defocus_blur", "gaussian_blur", "motion_blur", "zoom_blur", "elastic_transform"])
def test_lengths_are_a_share_of_the_image(kind: Kind) -> None:
    """Corrupted and then halved is halved and then corrupted."""

    def halved(image: np.ndarray) -> np.ndarray:
        return image.reshape(112, 2, 112, 2, 3).mean((1, 3))

    large = smooth_image(224)
    after = halved(corrupt(large, kind, 5, rng()))
    before = corrupt(halved(large), kind, 5, rng())
    change = np.abs(after - halved(large)).mean()
    assert np.abs(after - before)[8:-8, 8:-8].mean() < 0.15 * change


def test_bends_go_both_ways_and_neither_follows_the_other() -> None:
    ramps = [np.repeat(ramp[..., None], 3, axis=2) / 224 for ramp in np.indices((224, 224))]
    moved = [224 * (corrupt(ramp, "elastic_transform", 1, rng()) - ramp)[8:-8, 8:-8, 0] for ramp in ramps]
    uniform = 0.005 * 224 / 3**0.5  # the displacement of a pixel before it is smoothed
    for pixels in moved:
        assert pixels.std() == pytest.approx(12.5 * uniform / (2 * np.pi**0.5 * 0.01 * 224), rel=0.05)
    assert abs(np.corrcoef(moved[0].ravel(), moved[1].ravel())[0, 1]) < 0.1


def test_pixelated_photographs_have_few_colours(photos: list[Image.Image]) -> None:
    got = corrupt(at_size(photos[:1], 64)[0], "pixelate", 5, rng())
    assert len(np.unique(got.reshape(-1, 3), axis=0)) <= 16 * 16
    np.testing.assert_array_equal(got[0, 0], got[3, 3])
