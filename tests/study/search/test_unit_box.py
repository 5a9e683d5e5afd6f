"""Points become rows of a box and points again."""

from __future__ import annotations

import numpy as np
import pytest

from search_spaces.joint import FUSION, JOINT
from search_spaces.space import Knob, Space
from study.search.unit_box import UnitBox

MIXED: Space = {
    "contrastive_weight": Knob(kind="float", low=0.25, high=0.75),
    "temperature": Knob(kind="float", low=0.01, high=0.1, log=True),
    "words": Knob(kind="int", low=1, high=4),
    "batch": Knob(kind="int", low=1, high=100, log=True),
    "trainable": Knob(kind="choice", choices=("image", "all", "fusion")),
    "attack_steps": Knob(kind="choice", choices=(10, 1, 2)),
    "companion": Knob(kind="choice", choices=("anchor",)),
}


@pytest.mark.parametrize("space", [JOINT, FUSION, MIXED])
def test_points_survive_the_box_and_all_rows_are_points(space: Space) -> None:
    box, rng = UnitBox(space), np.random.default_rng(0)
    spread = box.snapped(rng.random((2000, box.size)))
    near = box.near(spread, 0.1, rng)
    for rows in (spread, near):
        points = [box.params(row) for row in rows]
        assert all(space[name].contains(value) for point in points for name, value in point.items())
        again = box.units(points)
        exact = [name != "batch" for name in space]  # a whole number on a logarithmic scale stands where it is
        np.testing.assert_allclose(again[:, exact], rows[:, exact], atol=1e-12)
        np.testing.assert_allclose(box.units([box.params(row) for row in again]), again, atol=1e-12)
    for column, (name, knob) in enumerate(space.items()):
        values = [box.params(row)[name] for row in spread]
        if knob.choices is not None:  # each about as often
            existing = spread[:, list(space).index(knob.above_zero)] > 0 if knob.above_zero else spread[:, column] >= 0
            counts = [sum(v == c for v, e in zip(values, existing, strict=True) if e) for c in knob.choices]
            assert min(counts) > 0.8 * existing.sum() / len(knob.choices)


def test_places_are_what_the_knobs_say() -> None:
    box = UnitBox(MIXED)
    point = {
        "contrastive_weight": 0.5,
        "temperature": 0.1**1.5,
        "words": 2,
        "batch": 10,
        "trainable": "all",
        "attack_steps": 2,
        "companion": "anchor",
    }
    (row,) = box.units([point])
    assert row.tolist() == pytest.approx([0.5, 0.5, 1 / 3, 0.5, 0.5, 0.5, 0])  # choices 1, 2, 10 are in their order
    assert box.params(row) == pytest.approx(point)
    # `trainable` has one feature for each of its choices, as has `companion`; none is nearer to another than a third.
    assert box.features(row[None])[0].tolist() == pytest.approx([0.5, 0.5, 1 / 3, 0.5, 0, 1, 0, 0.5, 1])


def test_what_does_not_exist_stands_at_zero() -> None:
    box = UnitBox(JOINT)
    column, parent = list(JOINT).index("attack_steps"), list(JOINT).index("epsilon")
    (row,) = box.units([{"contrastive_weight": 0.3, "epsilon": 0.0, "temperature": 0.02}])
    assert row[column] == 0
    rows = np.full((3, box.size), 0.9)
    rows[1, parent] = 0
    assert box.snapped(rows)[:, column].tolist() == [1, 0, 1]
    moved = box.near(box.snapped(rows), 0.5, np.random.default_rng(0))
    assert (moved[moved[:, parent] == 0, column] == 0).all()


def test_neighbours_are_near_and_move_in_every_knob() -> None:
    box, rng = UnitBox(JOINT), np.random.default_rng(0)
    start = box.snapped(np.full((4000, box.size), 0.5))
    moves = np.abs(box.near(start, 0.01, rng) - start)
    assert ((moves > 0).mean(0) > 0.03).all()
    assert (moves > 0).any(1).mean() > 0.5
    continuous = moves[:, :2][moves[:, :2] > 0]
    assert np.median(continuous) < 0.02
