"""Images as weather, cameras and storage spoil them: the corruptions of ImageNet-C (Hendrycks and Dietterich 2019).

Kinds, order of steps and the five severities are the published ones, which are for 224 pixels. On other sizes lengths
(radii, sigmas, flakes, displacements) keep their share of the image; strengths of pixels (noise, brightness, contrast,
saturation), JPEG quality and the factors of zoom and pixelation are the same at every size. Left out: frost, which
needs photographs of ice, and spatter. Not pixel for pixel the published images: blurs use anti-aliased kernels, glass
moves every pixel instead of swapping pairs, fog is the sum of its octaves, and elastic has the constants of Michaelis
et al. (2019), which rise with severity. On small images the weakest blurs do next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from math import ceil, log2
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from scipy import ndimage, signal

Kind = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur",
    "snow", "fog",
    "brightness", "contrast", "saturate", "elastic_transform", "pixelate", "jpeg_compression",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)

REFERENCE_PIXELS = 224


def corrupt(image: np.ndarray, kind: Kind, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Corrupt one image.

    Args:
        image: (size, size, 3) in [0, 1].
        kind: of corruption.
        severity: 1 to 5.
        rng: all randomness.

    Returns:
        The same shape and range.
    """
    apply, levels = _CORRUPTIONS[kind]
    return np.clip(apply(image, levels[severity - 1], rng), 0, 1)


def _scale(image: np.ndarray) -> float:
    return len(image) / REFERENCE_PIXELS


def _gaussian_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return image + sigma * rng.standard_normal(image.shape)


def _shot_noise(image: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(image * photons) / photons


def _impulse_noise(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    draw = rng.random(image.shape)
    return np.where(draw < amount / 2, 0, np.where(draw > 1 - amount / 2, 1, image))


def _speckle_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return image + image * sigma * rng.standard_normal(image.shape)


def _gaussian_blur(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return _smooth(image, sigma * _scale(image))


def _smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image, sigma, mode="nearest", axes=(0, 1))


def _defocus_blur(image: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    radius *= _scale(image)
    parts, reach = 8, ceil(radius)  # parts of a pixel along each side
    offset = (np.arange((2 * reach + 1) * parts) + 0.5) / parts - reach - 0.5
    inside = offset[:, None] ** 2 + offset**2 <= radius**2
    return _filtered(image, inside.reshape(2 * reach + 1, parts, 2 * reach + 1, parts).mean((1, 3)))


def _filtered(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """(size, size) or (size, size, channels), filtered by an odd square kernel, which is made to sum to 1."""
    reach = len(kernel) // 2
    edges = [(reach, reach), (reach, reach), (0, 0)][: image.ndim]
    kernel = (kernel / kernel.sum()).reshape(*kernel.shape, *[1] * (image.ndim - 2))
    return signal.fftconvolve(np.pad(image, edges, mode="edge"), kernel, mode="valid", axes=(0, 1))


def _glass_blur(image: np.ndarray, level: tuple[float, int, int], rng: np.random.Generator) -> np.ndarray:
    sigma, reach, rounds = level
    scale = _scale(image)
    image = _smooth(image, sigma * scale)
    places = np.indices(image.shape[:2])
    for _ in range(2 * rounds):  # the published swap moves a pixel twice a round: as itself and as a neighbour
        moved = places + rng.uniform(-reach * scale, reach * scale, places.shape)
        image = _sampled(image, moved)
    return _smooth(image, sigma * scale)


def _sampled(image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Bilinear at (2, size, size) rows and columns."""
    channels = [ndimage.map_coordinates(image[..., c], places, order=1, mode="nearest") for c in range(3)]
    return np.stack(channels, axis=-1)


def _motion_blur(image: np.ndarray, level: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    return _filtered(image, _trail(*level, rng.uniform(-45, 45), _scale(image)))


def _trail(radius: float, sigma: float, degrees: float, scale: float) -> np.ndarray:
    """A line from the centre that fades as half a Gaussian, one reference pixel wide at its start."""
    length = (2 * radius + 0.5) * scale
    reach = ceil(length)
    steps = np.linspace(-scale / 2, length, 8 * reach + 1)
    row, column = np.sin(np.deg2rad(degrees)) * steps, np.cos(np.deg2rad(degrees)) * steps
    border = (-reach - 0.5, reach + 0.5)
    fading = np.exp(-((steps / (sigma * scale)) ** 2) / 2)
    return np.histogram2d(row, column, bins=2 * reach + 1, range=(border, border), weights=fading)[0]


def _zoom_blur(image: np.ndarray, level: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    largest, step = level
    size = len(image)
    offset = np.arange(size) - (size - 1) / 2
    channels = np.moveaxis(image, 2, 0)
    layers = [channels]
    for factor in np.arange(1, largest, step):
        weights = _bilinear((size - 1) / 2 + offset / factor, size)
        layers.append(weights @ channels @ weights.T)
    return np.moveaxis(np.mean(layers, axis=0), 0, 2)


def _bilinear(places: np.ndarray, size: int) -> np.ndarray:
    """(places, size) weights that read a row of `size` values at fractional places within it."""
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size)))


def _snow(
    image: np.ndarray, level: tuple[float, float, float, float, float, float, float], rng: np.random.Generator
) -> np.ndarray:
    mean, sigma, flake, threshold, radius, trail_sigma, kept = level
    cells = round(REFERENCE_PIXELS / flake)
    flakes = _resized(mean + sigma * rng.standard_normal((cells, cells)), len(image))
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _filtered(flakes, _trail(radius, trail_sigma, rng.uniform(-135, -45), _scale(image)))
    grey = image @ np.array([0.299, 0.587, 0.114])
    bleached = kept * image + (1 - kept) * np.maximum(image, 1.5 * grey[..., None] + 0.5)
    return bleached + (flakes + np.rot90(flakes, 2))[..., None]


def _resized(grid: np.ndarray, size: int) -> np.ndarray:
    weights = _bilinear(np.linspace(0, len(grid) - 1, size), len(grid))
    return weights @ grid @ weights.T


def _fog(image: np.ndarray, level: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    density, decay = level
    size = len(image)
    haze = np.zeros((size, size))
    for octave in range(1, ceil(log2(size)) + 1):
        haze += _resized(rng.uniform(-1, 1, (2**octave + 1, 2**octave + 1)), size) / decay ** (2 * octave)
    haze = (haze - haze.min()) / np.ptp(haze)
    brightest = image.max()
    return (image + density * haze[..., None]) * brightest / (brightest + density)


def _brightness(image: np.ndarray, added: float, rng: np.random.Generator) -> np.ndarray:
    value = image.max(-1, keepdims=True)  # of HSV: all channels scale with it
    brighter = np.minimum(value + added, 1)
    return np.where(value > 0, image * brighter / np.maximum(value, 1e-9), brighter)


def _contrast(image: np.ndarray, kept: float, rng: np.random.Generator) -> np.ndarray:
    mean = image.mean((0, 1))
    return mean + kept * (image - mean)


def _saturate(image: np.ndarray, level: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    factor, added = level
    value = image.max(-1, keepdims=True)
    saturation = np.ptp(image, axis=-1, keepdims=True) / np.maximum(value, 1e-9)
    wanted = np.clip(factor * saturation + added, 0, 1)
    # Grey has no hue, so it stays grey.
    return value - (value - image) * wanted / np.where(saturation > 0, saturation, 1)


def _elastic_transform(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    size, reference = len(image), REFERENCE_PIXELS
    field = rng.uniform(-0.005 * reference, 0.005 * reference, (2, reference, reference))
    moved = [_resized(ndimage.gaussian_filter(axis, 0.01 * reference), size) * _scale(image) for axis in field]
    return _sampled(image, np.indices((size, size)) + strength * np.stack(moved))


def _pixelate(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    size = len(image)
    small = max(1, round(size * share))
    picture = _picture(image).resize((small, small), Image.Resampling.BOX)
    return np.asarray(picture.resize((size, size), Image.Resampling.NEAREST)) / 255


def _jpeg_compression(image: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    file = BytesIO()
    _picture(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray((image * 255).round().astype(np.uint8))


_CORRUPTIONS: dict[Kind, tuple[Callable[[np.ndarray, Any, np.random.Generator], np.ndarray], tuple[Any, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "defocus_blur": (_defocus_blur, (3, 4, 6, 8, 10)),
    "glass_blur": (_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (_zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),
    "snow": (
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
    "elastic_transform": (_elastic_transform, (12.5, 16.25, 21.25, 25, 30)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg_compression, (25, 18, 15, 10, 7)),
}
