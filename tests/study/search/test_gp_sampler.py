"""The Gaussian-process sampler: what it reads from trials, what growth it expects, and which point it proposes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr
from threadpoolctl import threadpool_limits

from search_spaces.space import Knob, Space
from study.config import Objective
from study.front.hypervolume import REFERENCE, hypervolume
from study.records import INFEASIBLE
from study.search.gp_sampler import Known, foretell, propose, read_trials, undominated
from study.search.unit_box import UnitBox

PLANE: Space = {
    "contrastive_weight": Knob(kind="float", low=0, high=1),
    "temperature": Knob(kind="float", low=0.5, high=1.5),
    "trainable": Knob(kind="choice", choices=("all", "image")),
}
BOX = UnitBox(PLANE)
TWO = (Objective(metric="clean/mr_r5"), Objective(metric="both/mr_r5"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def trial(number: int, weight: float, values: Sequence[float] | None, **changes: Any) -> FrozenTrial:
    params = {"contrastive_weight": weight, "temperature": 1.0, "trainable": "all"}
    state = TrialState.COMPLETE if values else changes.pop("state", TrialState.PRUNED)
    made = optuna.trial.create_trial(
        state=state,
        values=values,
        params=params,
        distributions=BOX.distributions,
        user_attrs=changes.pop("attributes", {}),
        constraints=changes.pop("constraints", None),
    )
    made.number = number
    assert not changes
    return made


def known(points: Any, costs: Any, **changes: Any) -> Known:
    points, costs = np.array(points, dtype=float), np.array(costs, dtype=float)
    fields: dict[str, Any] = {
        "extra": np.zeros(costs.shape),
        "usable": np.ones(len(points), dtype=bool),
        "running": np.zeros((0, BOX.size)),
        "limits": [],
    }
    return Known(points, costs, **{**fields, **changes})


def spread(count: int, seed: int = 0) -> Any:
    return BOX.snapped(np.random.default_rng(seed).random((count, BOX.size)))


def trade_off(points: Any) -> Any:
    """The front is at temperature 0.8 of the box; weight goes along it."""
    off = (points[:, 1] - 0.8) ** 2
    return np.column_stack([points[:, 0] ** 2 + off, (1 - points[:, 0]) ** 2 + off])


def test_what_trials_tell() -> None:
    rung = {"4": [0.4, 0.2]}
    trials = [
        trial(0, 0.0, [0.9, 0.1], attributes={"rungs": {"4": [0.7, 0.1]}}),
        trial(1, 0.5, [0.7, 0.3], attributes={"rungs": {"4": [0.5, 0.3]}}),
        trial(2, 1.0, [0.5, 0.2], constraints={"clean/mr_r5 >= 0.6": 0.1}),
        trial(3, 0.2, None, attributes={"rungs": rung}),
        trial(4, 0.3, None, attributes={"rungs": rung}, constraints={INFEASIBLE: 1.0}),
        trial(5, 0.4, None, state=TrialState.RUNNING),
        trial(6, 0.6, None, state=TrialState.FAIL),
        trial(7, 0.7, None, attributes={"rungs": {"2": [0.4, 0.2]}}),
        trial(8, 1.0, [0.5, np.inf]),
        trial(9, 0.8, None, attributes={"rungs": rung}, state=TrialState.RUNNING),
    ]
    elsewhere = trial(10, 0.9, [0.5, 0.5])
    elsewhere.params = {"contrastive_weight": 7.0}
    found = read_trials([*trials, elsewhere], BOX, TWO)
    assert found.points[:, 0].tolist() == [0, 0.5, 1, 0.2, 0.8]
    np.testing.assert_allclose(found.costs[:3], [[0.1, 0.9], [0.3, 0.7], [0.5, 0.8]])
    assert found.usable.tolist() == [True, True, False, False, False]
    # The rung says 0.2 too little clean recall and the robust recall as it ends.
    np.testing.assert_allclose(found.costs[3:], [[0.4, 0.8]] * 2, atol=1e-6)
    assert (found.extra[:3] == 0).all()
    assert found.running[:, 0].tolist() == [0.4, 0.8]
    (limit, infeasible) = found.limits
    assert (limit[0][:, 0].tolist(), limit[1].tolist()) == ([1.0], [0.1])
    assert dict(zip(infeasible[0][:, 0].tolist(), infeasible[1].tolist(), strict=True))[0.3] == 1
    assert infeasible[1].sum() == 1 - 6  # those that failed or run say nothing
    nothing = read_trials([], BOX, TWO)
    assert (nothing.points.shape, nothing.costs.shape, nothing.running.shape) == ((0, 3), (0, 2), (0, 3))


@pytest.mark.parametrize("temperatures", [(0.0, 0.5, 1.0), (0.2, 0.5, 0.8), (0.0, 0.2, 0.4, 0.6)])
def test_points_that_differ_in_one_knob_do_not_keep_the_search_from_the_others(temperatures: Sequence[float]) -> None:
    points = [[1.0, temperature, 0.0] for temperature in temperatures]
    found = known(points, trade_off(np.array(points)) / 2 + 0.2)
    weight, temperature, trainable = propose(found, BOX, {}, np.random.default_rng(0))
    assert (weight, trainable) == (0, 1)
    assert 0.6 < temperature < 0.85  # what they do say of their own knob counts


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_a_rung_foretells_without_bias_though_it_decides_who_goes_on(noise: float) -> None:
    rng = np.random.default_rng(1)
    late = 0.2 * rng.standard_normal((4000, 1))
    early = 0.3 + 0.5 * late + noise * rng.standard_normal((4000, 1))
    seen = np.where(early < np.median(early), late, np.nan)
    foretold, variance = foretell(early, seen)
    line = np.polyfit(late[:, 0], foretold[:, 0], 1)
    np.testing.assert_allclose(line, [1, 0], atol=0.1)  # the most probable end would have a slope below 1
    assert variance[0, 0] == pytest.approx((noise / 0.5) ** 2, rel=0.2)


def test_what_a_rung_cannot_foretell() -> None:
    early = np.array([[0.1], [0.2], [0.3]])
    assert np.isnan(foretell(early, np.array([[0.5], [np.nan], [np.nan]]))[0]).all()
    rng = np.random.default_rng(0)
    against = rng.random((50, 1))
    assert np.isnan(foretell(against, 1 - against)[0]).all()
    equal = np.full((5, 1), 0.2)  # with no difference at the rung, every end is as doubtful as they differ
    ends, variance = foretell(equal, np.array([[0.1], [0.2], [0.3], [np.nan], [np.nan]]))
    assert np.isfinite(ends).all()
    assert (variance > 1).all()


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_growth_is_that_of_the_hypervolume(objectives: int) -> None:
    rng = np.random.default_rng(2)
    front = rng.random((6, objectives))
    front /= np.linalg.norm(front, axis=1, keepdims=True)
    places, volumes = undominated(front)
    empty_places, empty_volumes = undominated(front[:0])
    assert len(empty_places) == len(places)
    unit = REFERENCE**objectives / empty_volumes.sum()
    left = REFERENCE**objectives - hypervolume(front)
    assert volumes.sum() * unit == pytest.approx(left, rel=0.1)
    assert not any((cost <= place - 1e-9).all() for place in places for cost in front)
    for point in 0.6 * front + 0.1:
        exact = hypervolume(np.vstack([front, point])) - hypervolume(front)
        certain = ((places >= point).all(1) * volumes).sum() * unit
        assert certain == pytest.approx(exact, abs=0.1 * left)
        mean, deviation = point, np.full(objectives, 0.1)
        expected = (ndtr((places - mean) / deviation).prod(1) * volumes).sum() * unit
        draws = mean + deviation * rng.standard_normal((3000, objectives))
        growth = [hypervolume(np.vstack([front, draw])) - hypervolume(front) for draw in draws[:400]]
        assert expected == pytest.approx(np.mean(growth), abs=0.1 * left)


def test_it_goes_where_the_front_is() -> None:
    points = spread(30)
    proposals = np.array(
        [propose(known(points, trade_off(points)), BOX, {}, np.random.default_rng(seed)) for seed in range(3)]
    )
    assert np.abs(proposals[:, 1] - 0.8).max() < 0.1
    again = propose(known(points, trade_off(points)), BOX, {}, np.random.default_rng(0))
    assert again.tolist() == proposals[0].tolist()


def test_it_does_not_go_where_others_run() -> None:
    points = spread(30)
    rng = np.random.default_rng(0)
    first = propose(known(points, trade_off(points)), BOX, {}, rng)
    second = propose(known(points, trade_off(points), running=first[None]), BOX, {}, rng)
    assert abs(first[0] - second[0]) > 0.05
    assert abs(second[1] - 0.8) < 0.1


def test_it_does_not_look_twice_where_nothing_is_known() -> None:
    left = spread(40)
    left[:, 0] *= 0.3
    equal = known(left, np.full((40, 2), 0.5))
    first = propose(equal, BOX, {}, np.random.default_rng(0))
    second = propose(replace(equal, running=first[None]), BOX, {}, np.random.default_rng(0))
    assert first[0] > 0.6
    assert np.linalg.norm(first - second) > 0.3


def test_it_keeps_away_from_what_is_infeasible() -> None:
    points = spread(40)
    excess = points[:, 0] - 0.4
    free = [propose(known(points, trade_off(points)), BOX, {}, np.random.default_rng(s))[0] for s in range(4)]
    bound = known(points, trade_off(points), limits=[(points, excess)], usable=excess <= 0)
    kept = [propose(bound, BOX, {}, np.random.default_rng(s))[0] for s in range(4)]
    assert max(free) > 0.45
    assert max(kept) < 0.45


def test_it_holds_what_is_given_and_repeats_nothing() -> None:
    points = spread(30)
    given = {"temperature": 0.75, "trainable": "image"}
    proposed = BOX.params(propose(known(points, trade_off(points)), BOX, given, np.random.default_rng(0)))
    assert {name: proposed[name] for name in given} == given
    small: Space = {"words": Knob(kind="choice", choices=(0, 1, 2)), "attack_steps": Knob(kind="int", low=1, high=2)}
    box = UnitBox(small)
    every = box.units([{"words": words, "attack_steps": steps} for words in (0, 1, 2) for steps in (1, 2)])
    rng = np.random.default_rng(0)
    for left in range(6):
        rest = np.delete(every, left, 0)
        data = Known(rest, rng.random((5, 2)), np.zeros((5, 2)), np.ones(5, dtype=bool), rest[:0], [])
        assert propose(data, box, {}, rng).tolist() == every[left].tolist()
