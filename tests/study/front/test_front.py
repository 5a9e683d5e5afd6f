from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from study.config import Objective
from study.front.dominance import front_mask, oriented, spread
from study.front.estimates import estimates, front, front_probability, near_front, write_front
from study.front.hypervolume import attainment, hypervolume, hypervolume_history, hypervolume_share
from study.records import Manifest
from trainables.results import Metric

ROBUST = Objective(metric="both/mr_r5")
CLEAN = Objective(metric="clean/mr_r5")
CHEAP = Objective(metric="cost/device_seconds", direction="minimize", low=0, high=100)


def costs_of(max_points: int = 8, max_objectives: int = 4) -> st.SearchStrategy[np.ndarray]:
    """Point sets on a coarse grid, so that ties, duplicates and points beyond the reference are common."""
    shape = st.tuples(st.integers(0, max_points), st.integers(1, max_objectives))
    return hnp.arrays(np.float64, shape, elements=st.integers(-1, 12).map(lambda tenths: tenths / 10))


def inclusion_exclusion(costs: np.ndarray, reference: float) -> float:
    """The volume of the union of boxes by its definition, exponential in the number of points."""
    boxes = np.maximum(costs[(costs < reference).all(axis=1)], 0)
    return sum(
        (-1) ** (size + 1) * np.prod(reference - np.max(subset, axis=0))
        for size in range(1, len(boxes) + 1)
        for subset in itertools.combinations(boxes, size)
    )


def manifest(
    number: int,
    robust: float = 0.5,
    clean: float = 0.5,
    *,
    state: str = "complete",
    seconds: float = 10.0,
    recipe: str | None = None,
    ended: float | None = None,
    replicate: int = 0,
) -> Manifest:
    return Manifest.model_validate(
        {
            "key": f"s-t{number:05d}-s{replicate}",
            "number": number + 100 * replicate,
            "replicate": replicate,
            "recipe": recipe,
            "params": {"epsilon": number / 255},
            "point": {"epsilon": number / 255},
            "state": state,
            "metrics": {
                "both/mr_r5": Metric(value=robust, low=robust - 0.1, high=robust + 0.1),
                "clean/mr_r5": Metric(value=clean, low=clean - 0.05, high=clean + 0.05),
            },
            "cost": {"device_seconds": seconds},
            "fingerprint": "f",
            "ended": float(number) if ended is None else ended,
        }
    )


def test_oriented_turns_to_minimisation_in_the_declared_range() -> None:
    costs = oriented([[1.0, 0.0], [0.25, 100.0], [0.0, 150.0]], [ROBUST, CHEAP])
    np.testing.assert_allclose(costs, [[0, 0], [0.75, 1], [1, 1.5]])
    assert oriented([], [ROBUST, CHEAP]).shape == (0, 2)


def test_front_keeps_duplicates_and_drops_weakly_dominated_points() -> None:
    costs = np.array([[0.1, 0.9], [0.5, 0.5], [0.5, 0.5], [0.5, 0.6], [0.4, 0.9], [0.9, 0.1], [1.0, 1.0]])
    assert front_mask(costs).tolist() == [True, True, True, False, False, True, False]


def test_points_without_a_number_are_never_on_the_front() -> None:
    costs = np.array([[np.nan, 0.0], [0.5, 0.5], [-np.inf, 0.1], [np.inf, np.inf]])
    assert front_mask(costs).tolist() == [False, True, False, False]


@given(costs_of())
def test_front_is_what_its_definition_says(costs: np.ndarray) -> None:
    expected = [not any((other <= point).all() and (other < point).any() for other in costs) for point in costs]
    assert front_mask(costs).tolist() == expected


@pytest.mark.parametrize(
    ("costs", "volume"),
    [
        ([[0.0]], 1.1),
        ([[0.4], [0.3], [0.3]], 0.8),
        ([[0.1, 0.1]], 1.0),
        ([[0.1, 0.6], [0.6, 0.1]], 0.5 + 0.5 - 0.25),
        ([[0.1, 0.6], [0.1, 0.6], [0.6, 0.1], [0.6, 0.6]], 0.75),  # duplicates and ties
        ([[0.1, 1.1], [1.2, 0.0]], 0.0),  # on the reference, beyond it
        ([[-5.0, 0.1]], 1.1),  # better than the box is worth the box
        ([[0.1, 0.1, 0.6], [0.1, 0.6, 0.1], [0.6, 0.1, 0.1]], 7 * 0.5**3),  # all but one of eight cubes
        ([[0.1, 0.1, 0.1, 0.6], [0.6, 0.6, 0.6, 0.1]], 0.5 + 0.125 - 0.0625),
    ],
)
def test_hypervolume_of_hand_worked_cases(costs: list[list[float]], volume: float) -> None:
    assert hypervolume(np.array(costs)) == pytest.approx(volume)


@given(costs_of(max_points=7))
def test_hypervolume_is_the_volume_of_the_union(costs: np.ndarray) -> None:
    assert hypervolume(costs) == pytest.approx(inclusion_exclusion(costs, 1.1), abs=1e-9)


@given(costs_of(), st.randoms(use_true_random=False))
def test_order_and_dominated_points_change_no_hypervolume(costs: np.ndarray, random) -> None:
    volume = hypervolume(costs)
    order = random.sample(range(len(costs)), len(costs))
    assert hypervolume(costs[order]) == pytest.approx(volume, abs=1e-12)
    worse = np.vstack([costs, costs + 0.1])
    assert hypervolume(worse) == pytest.approx(volume, abs=1e-12)


@given(costs_of(), st.data())
def test_a_further_point_never_lowers_the_hypervolume(costs: np.ndarray, data: st.DataObject) -> None:
    point = data.draw(hnp.arrays(np.float64, costs.shape[1], elements=st.floats(-0.2, 1.3)))
    assert hypervolume(np.vstack([costs, point])) >= hypervolume(costs) - 1e-12


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_hypervolume_agrees_with_sampling(objectives: int, points: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.random((points, objectives))
    samples = rng.random((40_000, objectives)) * 1.1
    share = np.mean((costs[None] <= samples[:, None]).all(axis=2).any(axis=1))
    assert hypervolume_share(costs) == pytest.approx(share, abs=5 * 0.5 / np.sqrt(len(samples)))


def test_what_stands_for_many_points_has_the_best_ends_and_no_gaps() -> None:
    line = np.array([[x, 100 - x] for x in range(101)], dtype=float)
    assert spread(line, 2) == [0, 100]
    assert spread(line, 5) == [0, 25, 50, 75, 100]
    assert spread(line * [1, 1000], 5) == [0, 25, 50, 75, 100], "whatever the units are"
    assert spread(np.vstack([[[np.nan, 0]], line[:3]]), 3) == [1, 2, 3]
    assert spread(np.ones((5, 2)), 3) == [0]
    assert spread(np.zeros((0, 2)), 3) == []


def test_front_takes_complete_trials_best_first_with_their_intervals() -> None:
    manifests = [
        manifest(0, 0.4, 0.8),
        manifest(1, 0.9, 0.9, state="infeasible"),
        manifest(2, 0.6, 0.5, recipe="mat"),
        manifest(3, 0.5, 0.5),
        manifest(4, 0.9, 0.9, state="failed"),
    ]
    entries = front(manifests, [ROBUST, CLEAN])
    assert [entry.key for entry in entries] == ["s-t00002-s0", "s-t00000-s0"]
    assert entries[0].values == {"both/mr_r5": 0.6, "clean/mr_r5": 0.5}
    assert entries[0].intervals["both/mr_r5"] == pytest.approx((0.5, 0.7))
    assert entries[0].recipe == "mat"
    assert entries[0].params == {"epsilon": 2 / 255}


def test_device_seconds_are_read_from_the_cost() -> None:
    manifests = [manifest(0, 0.5, seconds=90), manifest(1, 0.4, seconds=10), manifest(2, 0.4, seconds=20)]
    entries = front(manifests, [ROBUST, CHEAP])
    assert [entry.key for entry in entries] == ["s-t00000-s0", "s-t00001-s0"]
    assert entries[1].values["cost/device_seconds"] == 10
    assert entries[1].intervals["cost/device_seconds"] == (10, 10)


def test_a_trial_without_the_objective_is_not_on_the_front() -> None:
    other = Objective(metric="image/mr_r1")
    assert front([manifest(0)], [ROBUST, other]) == []
    assert front([], [ROBUST]) == []


def test_history_follows_the_order_trials_ended_and_counts_every_cost() -> None:
    manifests = [
        manifest(0, 0.5, 0.5, ended=30.0, seconds=1),
        manifest(1, 0.2, 0.2, ended=20.0, seconds=2),
        manifest(2, 0.9, 0.9, ended=40.0, seconds=4, state="infeasible"),
        manifest(3, 0.3, 0.3, ended=50.0, seconds=8),
    ]
    rows = hypervolume_history(manifests, [ROBUST, CLEAN])
    assert [row[:3] for row in rows] == [(20.0, 1, 2), (30.0, 2, 3), (40.0, 3, 7), (50.0, 4, 15)]
    low, high = 0.3**2 / 1.21, 0.6**2 / 1.21
    assert [row[3] for row in rows] == pytest.approx([low, high, high, high])


def test_front_file_is_only_touched_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    entries = front([manifest(0)], [ROBUST])
    write_front(path, entries)
    assert json.loads(path.read_text())[0]["intervals"] == {"both/mr_r5": [0.4, 0.6]}
    os.utime(path, (1, 1))
    write_front(path, entries)
    assert path.stat().st_mtime == 1
    write_front(path, front([manifest(0, 0.7)], [ROBUST]))
    assert path.stat().st_mtime > 1


def test_front_and_hypervolume_are_those_of_pymoo() -> None:
    from pymoo.indicators.hv import HV
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    rng = np.random.default_rng(0)
    for _ in range(1000):
        points, objectives = int(rng.integers(1, 30)), int(rng.integers(2, 5))
        costs = rng.integers(0, 8, (points, objectives)) / 5  # ties, duplicates, and some beyond the reference
        infeasible = rng.random(points) < 0.2
        feasible = np.flatnonzero(~infeasible)
        masked = np.where(infeasible[:, None], np.nan, costs)
        expected = feasible[NonDominatedSorting().do(costs[feasible])[0]] if len(feasible) else []
        assert sorted(expected) == np.flatnonzero(front_mask(masked)).tolist()
        volume = HV(ref_point=np.full(objectives, 1.1))(costs[feasible]) if len(feasible) else 0.0
        assert hypervolume(masked) == pytest.approx(volume, abs=1e-9)


def test_replicates_are_one_point_with_the_mean_and_the_spread_of_both_kinds() -> None:
    runs = [manifest(1, value, replicate=index) for index, value in enumerate([0.5, 0.56, 0.44])]
    (estimate,) = estimates([runs[1], manifest(0, state="stopped"), runs[0], runs[2]], [ROBUST])
    metric = estimate.metrics["both/mr_r5"]
    half = np.hypot(0.1, 4.302653 * 0.06 / np.sqrt(3))  # of the images, and Student's t of the sample's deviation
    assert (estimate.first.key, estimate.replicates) == ("s-t00001-s0", 3)
    assert (metric.value, metric.low, metric.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    (entry,) = front(
        [manifest(2, 0.52, 0.6), manifest(1, 0.55, 0.6), manifest(1, 0.43, 0.6, replicate=1)], [ROBUST, CLEAN]
    )
    assert (entry.key, entry.replicates) == ("s-t00002-s0", 1), "the mean of the other is 0.49"
    assert len(hypervolume_history(runs, [ROBUST])) == 3
    assert [row[3] for row in hypervolume_history(runs, [ROBUST])] == pytest.approx([0.6 / 1.1] * 3)


def test_probability_of_the_front_is_that_of_its_definition() -> None:
    costs = np.array([[0.3, 0.3], [0.4, 0.4], [0.9, 0.9], [0.0, 0.8]])
    assert front_probability(costs[:, :, None]).tolist() == [1, 0, 0, 1]
    errors = 0.1 * np.random.default_rng(0).standard_normal((2, 2, 4000))
    found = front_probability(costs[:2, :, None] + errors)
    # Each axis: the difference is normal with mean 0.1 and deviation 0.1 * sqrt(2), so the worse one wins it with 0.24.
    assert found[1] == pytest.approx(1 - 0.7602**2, abs=0.03)
    assert found[0] == pytest.approx(1 - 0.2398**2, abs=0.02)
    assert front_probability(np.zeros((0, 2, 5))).tolist() == []


def test_near_the_front_is_what_may_be_on_it() -> None:
    manifests = [
        manifest(0, 0.6, 0.6),
        manifest(1, 0.55, 0.58),
        manifest(2, 0.2, 0.2),
        manifest(3, 0.9, state="stopped"),
    ]
    assert near_front(manifests, [ROBUST, CLEAN]) == {"s-t00000-s0", "s-t00001-s0"}
    (entry,) = front(manifests, [ROBUST, CLEAN])
    assert 0.8 < entry.probability < 1
    assert near_front([], [ROBUST]) == set()


def test_attainment_is_what_a_share_of_the_runs_reaches() -> None:
    fronts = [np.array([[0.0, 0.8], [0.4, 0.2]]), np.array([[0.2, 0.5]]), np.array([[0.2, 0.6], [0.4, 0.1]])]
    assert attainment(fronts, 1 / 3).tolist() == [[0, 0.8], [0.2, 0.5], [0.4, 0.1]]
    assert attainment(fronts, 0.5).tolist() == [[0, np.inf], [0.2, 0.6], [0.4, 0.2]]
    assert attainment(fronts, 1.0).tolist() == [[0, np.inf], [0.2, 0.8], [0.4, 0.5]]
