"""The embedded default data set: scenes of coloured shapes in relations, in COCO format within seconds.

Each scene has two objects (shape, colour, size, cell), a background shade and a *faint* background
texture. Five captions of different form and completeness describe it. The texture is worth a lot of clean
recall and is only a few grey levels strong, so an L-infinity attacker can repaint it: a model that leans on
it is accurate and fragile, one that does not is neither. That is the trade-off (Tsipras et al. 2019,
"Robustness may be at odds with accuracy").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image

from trainables.config import TEST, VAL, ShapesConfig

VERSION = 3
"""Part of the data hash: raise it when the scenes or captions change."""

PIXELS = 64
CELL = PIXELS // 3
GRID = np.mgrid[:PIXELS, :PIXELS]
COLOURS = {
    "red": (165, 84, 80),
    "orange": (172, 122, 76),
    "yellow": (170, 160, 87),
    "green": (90, 136, 92),
    "teal": (81, 136, 137),
    "blue": (84, 102, 159),
    "purple": (125, 92, 148),
    "pink": (174, 122, 146),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar")
SIZES = {"small": 0.62, "large": 0.98}
SHADES = {"dark": 80, "grey": 118, "bright": 160}
TEXTURES = ("plain", "striped", "dotted", "checkered")
TEXTURE_LEVELS = 4
NOISE_LEVELS = 2.0

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
RELATIONS = {
    (0, 1): ("left of", "to the left of"),
    (0, -1): ("right of", "to the right of"),
    (1, 0): ("above", "over"),
    (-1, 0): ("below", "under"),
}


@cache
def _mask(shape: str, size: str, row: int, column: int) -> np.ndarray:
    """A shape's pixels; there are only a few hundred, so every one is worked out once."""
    y, x = GRID
    radius = SIZES[size] * CELL / 2
    dy = np.abs(y - (row + 0.5) * CELL + 0.5) / radius
    dx = np.abs(x - (column + 0.5) * CELL + 0.5) / radius
    far = np.hypot(dx, dy)
    down = (y - (row + 0.5) * CELL + 0.5) / radius
    masks = {
        "circle": far <= 1,
        "square": np.maximum(dx, dy) <= 0.88,
        "triangle": (down >= -1) & (down <= 0.9) & (dx <= (down + 1) / 1.9),
        "diamond": dx + dy <= 1.0,
        "cross": (np.minimum(dx, dy) <= 0.3) & (np.maximum(dx, dy) <= 1),
        "ring": (far <= 1) & (far >= 0.55),
        "bar": (dx <= 1) & (dy <= 0.36),
    }
    mask: np.ndarray = masks[shape]
    mask.flags.writeable = False  # shared by every caller
    return mask


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `row` and `column` are cells of a 3 x 3 grid."""

    shape: str
    colour: str
    size: str
    row: int
    column: int

    def mask(self) -> np.ndarray:
        """Where it is drawn, bool (PIXELS, PIXELS), read-only."""
        return _mask(self.shape, self.size, self.row, self.column)


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    things: tuple[Thing, ...]
    shade: str
    texture: str


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene; its objects lie in different cells."""
    cells = rng.permutation(9)[:2]
    things = tuple(
        Thing(
            shape=SHAPES[rng.integers(len(SHAPES))],
            colour=list(COLOURS)[rng.integers(len(COLOURS))],
            size=list(SIZES)[rng.integers(2)],
            row=int(cell) // 3,
            column=int(cell) % 3,
        )
        for cell in cells
    )
    return Scene(things, list(SHADES)[rng.integers(len(SHADES))], TEXTURES[rng.integers(len(TEXTURES))])


@cache
def _pattern(texture: str, shift_y: int, shift_x: int) -> np.ndarray:
    """A background texture of unit strength, (PIXELS, PIXELS)."""
    y, x = GRID[0] + shift_y, GRID[1] + shift_x
    patterns = {
        "plain": np.zeros(y.shape),
        "striped": np.where(y % 8 < 4, 1.0, -1.0),
        "dotted": np.where((y % 8 < 3) & (x % 8 < 3), 2.0, -0.3),
        "checkered": np.where((y // 4 + x // 4) % 2, 1.0, -1.0),
    }
    pattern = patterns[texture]
    pattern.flags.writeable = False
    return pattern


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8 (PIXELS, PIXELS, 3), with sensor noise."""
    ground = SHADES[scene.shade] + TEXTURE_LEVELS * _pattern(scene.texture, *rng.integers(0, 8, size=2).tolist())
    canvas = np.repeat(ground[..., None], 3, axis=2)
    for thing in scene.things:
        canvas[thing.mask()] = np.asarray(COLOURS[thing.colour]) + rng.normal(0, 6, size=3)
    canvas += rng.normal(0, NOISE_LEVELS, size=canvas.shape)
    return canvas.clip(0, 255).round().astype(np.uint8)


def describe(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five captions of different forms.

    Each says something twice, as people do, so that a model that reads all of it can see through one changed word.
    """

    def phrase(thing: Thing, sized: bool = False) -> str:
        size = f"{_pick(SIZE_WORDS[thing.size], rng)} " if sized else ""
        return f"{size}{thing.colour} {thing.shape}"

    def size(thing: Thing) -> str:
        return _pick(SIZE_WORDS[thing.size], rng)

    def relation(one: Thing, other: Thing) -> str:
        down, right = other.row - one.row, other.column - one.column
        step = (0, int(np.sign(right))) if abs(right) >= abs(down) else (int(np.sign(down)), 0)
        return _pick(RELATIONS[step], rng)

    def couple() -> tuple[Thing, Thing, str]:
        one, other = (scene.things[i] for i in rng.permutation(len(scene.things))[:2])
        return one, other, relation(one, other)

    captions = []
    one, other, place = couple()
    ending = f"the {phrase(one)} is {size(one)} and the {phrase(other)} is {size(other)}"
    captions.append(f"a {phrase(one)} {place} a {phrase(other)} {ending}")
    one, other, place = couple()
    opening = f"a {phrase(one, sized=True)} and a {phrase(other, sized=True)} on a {scene.texture} background"
    captions.append(f"{opening} the {one.colour} one is {place} the {other.colour} one")
    one, other, place = couple()
    opening = f"a {scene.shade} {scene.texture} picture of a {phrase(one)} and a {phrase(other)}"
    captions.append(f"{opening} {one.shape} {place} {other.shape}")
    one, other, place = couple()
    opening = f"{one.colour} and {other.colour} shapes"
    captions.append(f"{opening} the {phrase(one)} {place} the {phrase(other)} on {scene.shade} ground")
    one, other, _ = couple()
    opening = f"the {one.shape} is {one.colour} and the {other.shape} is {other.colour}"
    captions.append(f"{opening} a {phrase(one, sized=True)} with a {phrase(other, sized=True)}")
    return captions


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def write(root: Path, config: ShapesConfig) -> None:
    """Write `images/`, `captions.json`, `instances.json`, `split.json` below `root`, equal for equal configs.

    The PNG files are uncompressed: faster, and their sizes (part of the data hash) are the same everywhere.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    images, captions, instances = [], [], []
    sizes = {"train": config.train_images, VAL: config.val_images, TEST: config.test_images}
    numbers = iter(range(1, sum(sizes.values()) + 1))
    split = {name: list(islice(numbers, size)) for name, size in sizes.items()}
    for image_id in chain(*split.values()):
        rng = np.random.default_rng([config.seed, image_id])
        scene = draw_scene(rng)
        file_name = f"{image_id:08d}.png"
        Image.fromarray(render(scene, rng)).save(root / "images" / file_name, compress_level=0)
        images.append({"id": image_id, "file_name": file_name, "width": PIXELS, "height": PIXELS})
        for index, caption in enumerate(describe(scene, rng)):
            captions.append({"id": image_id * 10 + index, "image_id": image_id, "caption": caption})
        instances += [_instance(image_id * 10 + i, image_id, thing) for i, thing in enumerate(scene.things)]
    categories = [{"id": i, "name": shape} for i, shape in enumerate(SHAPES, 1)]
    info = {"description": f"procedural shapes, version {VERSION}"}
    _dump(root / "captions.json", {"info": info, "images": images, "annotations": captions})
    _dump(
        root / "instances.json",
        {"info": info, "images": images, "annotations": instances, "categories": categories},
    )
    _dump(root / "split.json", split)


def _instance(annotation_id: int, image_id: int, thing: Thing) -> dict[str, object]:
    """COCO instance with box and mask."""
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": SHAPES.index(thing.shape) + 1,
        "iscrowd": 1,
        **_region(thing.shape, thing.size, thing.row, thing.column),
        "colour": thing.colour,
        "size": thing.size,
    }


@cache
def _region(shape: str, size: str, row: int, column: int) -> dict[str, object]:
    """Box, area and mask (uncompressed run lengths, column-major, starting with background)."""
    mask = _mask(shape, size, row, column)
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    flat = np.concatenate([[0], mask.flatten(order="F").astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {
        "bbox": [
            int(columns[0]),
            int(rows[0]),
            int(columns[-1] - columns[0] + 1),
            int(rows[-1] - rows[0] + 1),
        ],
        "area": int(mask.sum()),
        "segmentation": {"counts": [int(count) for count in counts], "size": [PIXELS, PIXELS]},
    }


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
