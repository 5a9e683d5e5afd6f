from __future__ import annotations

import math
import random

import numpy as np
import pytest

from dashboards.labels import CANVASES, DOT, STAR, cover, label_boxes, meet, place_labels

TITLES = ["Finetune", "TeCoA-ITR", "FARE", "MAT", "MAT+ (1:N)", "MMCoA"]


def conflicts(anchors: list[tuple[float, float]], others: list[tuple[float, float]]) -> list[str]:
    """Labels on labelled markers, on each other, or over the edge; on any of the canvases."""
    offsets = place_labels(TITLES, anchors, others)
    found = []
    for canvas in CANVASES:
        size = np.asarray(canvas)
        given = zip(TITLES, anchors, offsets, strict=True)
        boxes = np.vstack([label_boxes(text, anchor, np.array([offset]), canvas) for text, anchor, offset in given])
        found += [f"{TITLES[index]} on a star" for index, _ in np.argwhere(cover(boxes, anchors * size, STAR))]
        for index, box in enumerate(boxes):
            found += [f"{TITLES[index]} on {TITLES[place]}" for place in np.flatnonzero(meet(boxes[:index], box[None]))]
            if (box[:2] < 0).any() or (box[2:] > size).any():
                found.append(f"{TITLES[index]} over the edge")
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("spread", [0.03, 0.1, 0.25], ids=["clump", "cluster", "spread"])
def test_no_label_is_on_another_ones_marker(seed: int, spread: float) -> None:
    draw = random.Random(seed)

    def near(centre: tuple[float, float]) -> tuple[float, float]:
        x, y = (min(max(draw.gauss(at, spread), 0.02), 0.98) for at in centre)
        return x, y

    centre = draw.uniform(0.1, 0.9), draw.uniform(0.1, 0.9)
    anchors = [near(centre) for _ in TITLES]
    assert conflicts(anchors, [near((0.5, 0.5)) for _ in range(30)]) == []


def test_labels_avoid_markers_without_a_label_where_there_is_room() -> None:
    draw = random.Random(1)
    anchors = [(0.15 + 0.14 * index, 0.5) for index in range(6)]
    others = [(draw.random(), draw.uniform(0.5, 0.62)) for _ in range(40)]  # a crowd above the labelled ones
    offsets = place_labels(TITLES, anchors, others)
    for text, anchor, offset in zip(TITLES, anchors, offsets, strict=True):
        boxes = label_boxes(text, anchor, np.array([offset]), CANVASES[-1])
        assert not cover(boxes, np.array(others) * CANVASES[-1], DOT).any(), text


def test_covering_and_meeting() -> None:
    boxes = np.array([[0.0, 0.0, 10.0, 4.0], [10.0, 0.0, 20.0, 4.0], [9.0, 3.0, 12.0, 9.0]])
    assert meet(boxes, boxes[:1]).tolist() == [True, False, True], "sharing an edge is not overlapping"
    points = np.array([[5.0, 2.0], [11.0, 6.0], [13.0, 12.0]])
    assert cover(boxes[:1], points, 2.3).tolist() == [[True, True, False]], "the second by its corner"


def test_a_lonely_label_is_near_and_equal_points_have_labels_apart() -> None:
    ((across, up),) = place_labels(["MAT"], [(0.5, 0.5)], [])
    assert math.hypot(across, up) < 40
    assert conflicts([(0.5, 0.5)] * 6, []) == []
    assert place_labels(TITLES, [(0.5, 0.5)] * 6, []) == place_labels(TITLES, [(0.5, 0.5)] * 6, [])
    assert place_labels([], [], [(0.1, 0.1)]) == []


@pytest.mark.parametrize("height", [0.3, 0.5, 0.7])
def test_labels_lie_beside_the_line_of_the_front(height: float) -> None:
    anchors, line = [(0.3, height), (0.7, height)], [(0.05, height), (0.95, height)]
    along = np.linspace(*line, 200)
    for canvas in CANVASES:
        for text, anchor, offset in zip(TITLES, anchors, place_labels(TITLES[:2], anchors, [], line), strict=False):
            box = label_boxes(text, anchor, np.array([offset]), canvas)
            assert not cover(box, along * np.asarray(canvas), 1.0).any(), f"{text} hides the line"
