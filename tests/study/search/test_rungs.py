"""Who goes on from a rung: a pure function of what was measured there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from study.config import Constraint, EarlyStopping, Objective
from study.front.dominance import front_mask
from study.search.rungs import RungTable, better, is_rung, violation

CLEAN, ROBUST = Objective(metric="clean/mr_r5"), Objective(metric="both/mr_r5")
tenths = st.integers(0, 10).map(lambda number: number / 10)
cohorts = st.lists(st.tuples(tenths, tenths), min_size=1, max_size=12)


def table(points: list[tuple[float, float]], eta: int = 3, **constraint: float) -> RungTable:
    constraints = [Constraint(metric="clean/mr_r5", **constraint)] if constraint else []
    rungs = RungTable([CLEAN, ROBUST], constraints, EarlyStopping(eta=eta))
    for number, (clean, robust) in enumerate(points):
        rungs.add(f"t{number}", 7, {"clean/mr_r5": clean, "both/mr_r5": robust})
    return rungs


@pytest.mark.parametrize(
    ("eta", "first", "rungs"),
    [(3, 1, [1, 3, 9, 27]), (2, 1, [1, 2, 4, 8, 16]), (3, 2, [2, 6, 18]), (2, 3, [3, 6, 12, 24])],
)
def test_rungs_lie_eta_times_apart(eta: int, first: int, rungs: list[int]) -> None:
    assert [epoch for epoch in range(1, 30) if is_rung(epoch, first, eta)] == rungs


def test_a_better_rank_comes_before_and_equal_ranks_do_not() -> None:
    costs = np.array([[0.0, 1.0], [0.5, 0.5], [0.4, 0.6], [1.0, 0.0], [0.6, 0.6], [0.6, 0.6], [0.7, 0.7]])
    assert [better(costs, np.zeros(7), index) for index in range(7)] == [0, 0, 0, 0, 4, 4, 6]


def test_what_violates_less_comes_first_whatever_it_measures() -> None:
    costs = np.array([[0.0, 0.0], [0.9, 0.9], [0.8, 0.8]])
    assert [better(costs, np.array([0.2, 0.0, 0.1]), index) for index in range(3)] == [2, 0, 1]
    assert [better(costs, np.array([math.inf, 0.0, 0.1]), index) for index in range(3)] == [2, 0, 1]


def test_what_is_no_number_comes_last() -> None:
    costs = np.array([[np.nan, 0.0], [0.9, 0.9], [np.nan, np.nan]])
    assert better(costs, np.zeros(3), 1) == 0
    assert better(costs, np.zeros(3), 2) == 2


@pytest.mark.parametrize("objectives", [2, 3])
def test_an_infinite_cost_is_one(objectives: int) -> None:
    costs = np.array([[np.inf, 0.0, 0.0], [0.9, 0.9, 0.0], [np.inf, 0.9, 0.0]])[:, :objectives]
    assert [better(costs, np.zeros(3), index) for index in range(3)] == [0, 0, 2]


@given(cohorts)
def test_the_order_is_that_of_its_definition(points: list[tuple[float, float]]) -> None:
    costs = 1 - np.array(points)
    ranks = np.full(len(costs), -1)
    for rank in range(len(costs)):
        left = np.flatnonzero(ranks < 0)
        if len(left):
            ranks[left[front_mask(costs[left])]] = rank
    three = np.column_stack([costs, np.zeros(len(costs))])
    for index in range(len(costs)):
        found = better(costs, np.zeros(len(costs)), index), better(three, np.zeros(len(costs)), index)
        assert found == (np.sum(ranks < ranks[index]),) * 2


@given(cohorts, st.integers(2, 4))
def test_decisions_do_not_change_afterwards_and_can_be_made_again(points: list[tuple[float, float]], eta: int) -> None:
    growing = RungTable([CLEAN, ROBUST], [], EarlyStopping(eta=eta))
    at_once = []
    for number, (clean, robust) in enumerate(points):
        growing.add(f"t{number}", 7, {"clean/mr_r5": clean, "both/mr_r5": robust})
        at_once.append(growing.stop_reason(f"t{number}", 7))
    rebuilt = table(points, eta)
    rebuilt.add("t0", 7, {"clean/mr_r5": 0.0, "both/mr_r5": 0.0})  # a resumed trial repeats itself
    assert [rebuilt.stop_reason(f"t{number}", 7) for number in range(len(points))] == at_once


@given(cohorts)
def test_a_point_better_than_all_goes_on_and_a_worse_one_is_stopped(points: list[tuple[float, float]]) -> None:
    assert table([*points, (1.1, 1.1)]).stop_reason(f"t{len(points)}", 7) is None
    worst = table([*points, (-0.1, -0.1)]).stop_reason(f"t{len(points)}", 7)
    assert worst == f"stopped at step 7: {len(points)} of {len(points)} trials were better there"


@given(st.lists(tenths, min_size=9, max_size=30, unique=False), st.integers(2, 4))
def test_in_the_long_run_about_one_in_eta_goes_on(values: list[float], eta: int) -> None:
    rungs = table([(value, value) for value in sorted(values)], eta)
    best_last = [rungs.stop_reason(f"t{number}", 7) for number in range(len(values))]
    assert best_last == [None] * len(values), "each was the best when it came"
    worst_first = table([(value, value) for value in sorted(set(values), reverse=True)], eta)
    goes_on = [worst_first.stop_reason(f"t{number}", 7) is None for number in range(len(set(values)))]
    assert goes_on == [number < (number + 1) / eta for number in range(len(set(values)))]


def test_rungs_of_other_steps_and_switched_off_stopping_do_not_count() -> None:
    rungs = table([(0.9, 0.9), (0.8, 0.8)])
    rungs.add("t1", 14, {"clean/mr_r5": 0.1, "both/mr_r5": 0.1})
    assert rungs.stop_reason("t1", 14) is None
    assert rungs.of("t1") == {
        7: {"clean/mr_r5": 0.8, "both/mr_r5": 0.8},
        14: {"clean/mr_r5": 0.1, "both/mr_r5": 0.1},
    }
    off = RungTable([CLEAN, ROBUST], [], EarlyStopping(enabled=False), rungs.rows)
    assert rungs.stop_reason("t1", 7)
    assert off.stop_reason("t1", 7) is None


def test_costs_so_far_are_compared_at_equal_steps() -> None:
    cost = Objective(metric="cost/device_seconds", direction="minimize", low=0, high=100)
    rungs = RungTable([ROBUST, cost], [], EarlyStopping(eta=2))
    for key, seconds in (("cheap", 5.0), ("dear", 9.0)):
        rungs.add(key, 7, {"both/mr_r5": 0.2, "cost/device_seconds": seconds})
    assert rungs.stop_reason("dear", 7)


def test_infeasible_at_a_rung_is_behind_the_feasible() -> None:
    assert table([(0.5, 0.1), (0.4, 0.9)], 2).stop_reason("t1", 7) is None
    assert table([(0.5, 0.1), (0.4, 0.9)], 2, at_least=0.45).stop_reason("t1", 7)
    bounds = [Constraint(metric="a", at_least=0.5), Constraint(metric="b", at_most=10)]
    assert violation(bounds, {"a": 0.5, "b": 10}) == 0
    assert violation(bounds, {"a": 0.3, "b": 11}) == pytest.approx(1.2)
    assert violation(bounds, {"a": 0.9}) == math.inf
