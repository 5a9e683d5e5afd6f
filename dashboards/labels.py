"""Where the names of points go on a plot: beside their own marker, on nobody's, tied to it by a line.

A page has many widths and a plot stretches with it, while a label keeps its size and its distance from its point in
pixels. So a place is chosen that is good on every canvas of a few, from a phone to a wide screen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Pair = tuple[float, float]

CANVASES: tuple[Pair, ...] = ((240, 288), (240, 408), (430, 288), (650, 408), (940, 408))
"""Width and height of the area between the axes, in pixels."""

CHARACTER, LINE = 7.5, 20.0
"""Size of a letter in pixels, at the font size of labels; wide enough for the widest of the usual fonts."""

DISTANCES = (20.0, 30.0, 42.0, 58.0, 78.0, 104.0, 136.0)
"""Of a label's nearer edge from its point, in pixels."""

DIRECTIONS = 16

STAR, DOT = 10.0, 8.0
"""Radius of the markers that have labels and of others, in pixels."""

COVERS_STAR, COVERS_LABEL, LEAVES, COVERS_DOT, CROSSED, COVERS_LINE = 1e4, 1e4, 1e3, 60.0, 4.0, 3.0
"""What it costs, in pixels of distance, to lie on a labelled marker, on a label, over the edge, on another marker, and
for a line to pass a marker, and to lie on one of the `STEPS` parts of a piece of the front line."""

STEPS = 24

ROUNDS = 4


def place_labels(
    texts: Sequence[str], anchors: Sequence[Pair], others: Sequence[Pair], line: Sequence[Pair] = ()
) -> list[Pair]:
    """Offsets from points to the middles of their labels, in pixels, upwards; the same input gives the same places.

    Each label in turn takes the place that costs least given the others, until none wants to move.

    Args:
        texts: of the labels.
        anchors: their points, in parts of the canvas, 0 to 1 from the lower left.
        others: further points that have no label.
        line: corners of a line that labels had better not lie on.
    """
    stars, dots = np.reshape(anchors, (-1, 2)), np.reshape(others, (-1, 2))
    pieces = [np.linspace(start, end, STEPS) for start, end in itertools.pairwise(line)]
    inked = np.concatenate(pieces) if pieces else np.zeros((0, 2))
    choices = [_candidates(text) for text in texts]
    alone = [_cost_alone(stars, index, dots, inked, texts[index], choices[index]) for index in range(len(texts))]
    boxes = [
        [label_boxes(text, anchor, offsets, canvas) for canvas in CANVASES]
        for text, anchor, offsets in zip(texts, anchors, choices, strict=True)
    ]

    def costs_of(index: int, chosen: Sequence[int]) -> Floats:
        """Of each place of a label, as the others are placed."""
        costs = alone[index].copy()
        for place in range(len(chosen)):
            if place != index:
                for own, taken in zip(boxes[index], boxes[place], strict=True):
                    costs += COVERS_LABEL * meet(own, taken[chosen[place], None])
        return costs

    best: tuple[float, list[int]] = math.inf, []
    for turn in range(max(len(texts), 1)):  # who chooses first decides where it ends
        order = [*range(turn, len(texts)), *range(turn)]
        chosen = [int(costs.argmin()) for costs in alone]
        for _ in range(ROUNDS):
            before = list(chosen)
            for index in order:
                chosen[index] = int(costs_of(index, chosen).argmin())
            if chosen == before:
                break
        total = sum(float(costs_of(index, chosen)[chosen[index]]) for index in order)
        best = min(best, (total, chosen))
    return [(float(x), float(y)) for x, y in (offsets[at] for offsets, at in zip(choices, best[1], strict=True))]


def label_boxes(text: str, anchor: Pair, offsets: Floats, canvas: Pair) -> Floats:
    """The rectangle of a label at each of several offsets, in pixels.

    Args:
        text: of the label.
        anchor: of its point, in parts of the canvas.
        offsets: from the point to the middle of the label, (n, 2), in pixels, upwards.
        canvas: width and height.

    Returns:
        (n, 4): left, bottom, right, top.
    """
    middle = np.asarray(anchor) * canvas + offsets
    half = np.array([CHARACTER * len(text) / 2 + 2, LINE / 2])
    return np.hstack([middle - half, middle + half])


def meet(boxes: Floats, others: Floats) -> Bools:
    """Which boxes, (n, 4), overlap with the one of `others`, (n or 1, 4), in the same row: (n,)."""
    apart = (boxes[:, :2] >= others[:, 2:]) | (others[:, :2] >= boxes[:, 2:])
    overlap: Bools = np.logical_not(apart.any(axis=1))
    return overlap


def cover(boxes: Floats, points: Floats, radius: float) -> Bools:
    """Which boxes, (n, 4), touch the discs about which of the points, (p, 2): (n, p)."""
    nearest = np.clip(points, boxes[:, None, :2], boxes[:, None, 2:])
    touched: Bools = np.linalg.norm(nearest - points, axis=2) < radius
    return touched


def _candidates(text: str) -> Floats:
    """Places around a point, the nearer ones first: (n, 2)."""
    angles = 2 * math.pi * np.arange(DIRECTIONS) / DIRECTIONS
    half = CHARACTER * len(text) / 2 + 2
    rings = [[np.cos(angles) * (distance + half), np.sin(angles) * (distance + LINE / 2)] for distance in DISTANCES]
    return np.round(np.concatenate([np.transpose(ring) for ring in rings]), 1)


def _cost_alone(stars: Floats, index: int, dots: Floats, inked: Floats, text: str, offsets: Floats) -> Floats:
    """Of each place of a label, whatever the other labels do."""
    costs: Floats = np.linalg.norm(offsets, axis=1)
    for canvas in CANVASES:
        size = np.asarray(canvas)
        boxes = label_boxes(text, stars[index], offsets, canvas)
        costs += LEAVES * ((boxes[:, :2] < 0).any(axis=1) | (boxes[:, 2:] > size).any(axis=1))
        costs += COVERS_LINE * cover(boxes, inked * size, 2.0).sum(axis=1)
        for points, radius, price in ((stars, STAR, COVERS_STAR), (dots, DOT, COVERS_DOT)):
            costs += price * cover(boxes, points * size, radius).sum(axis=1)
            costs += CROSSED * _passed((points - stars[index]) * size, offsets, radius).sum(axis=1)
    return costs


def _passed(points: Floats, offsets: Floats, radius: float) -> Bools:
    """Which lines from the origin to the offsets, (n, 2), touch the discs about which of the points, (p, 2): (n, p)."""
    share = np.clip(offsets @ points.T / (offsets**2).sum(axis=1, keepdims=True), 0, 1)
    away = np.linalg.norm(share[..., None] * offsets[:, None] - points, axis=2)
    passed: Bools = (away < radius) & points.any(axis=1)
    return passed
