"""Multi-objective early stopping: successive halving on Pareto ranks.

Asynchronous successive halving of the stopping kind (Li et al. 2020, "A system for massively parallel hyperparameter
tuning") by Pareto rank, as multi-objective ASHA (Schmucker et al. 2021, "Multi-objective asynchronous successive
halving"). A rung is an optimiser step at which trials report a small evaluation; a trial goes on from it if it is among
the best `1 / eta` of those that reached the rung so far. Decisions are pure functions of the rung's table, so the same
table gives the same decision.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from study.config import Constraint, EarlyStopping, Objective
from study.front.dominance import Floats, front_mask, oriented

COHORT = 1000
"""Trials of a rung that one is compared with: enough to rank it, and as quick after 10,000 trials as after 1,000."""


def is_rung(epoch: int, first_epoch: int, eta: int) -> bool:
    """Whether trials are compared after this epoch: the first one, then `eta` times as late each time."""
    while epoch > first_epoch and epoch % eta == 0:
        epoch //= eta
    return epoch == first_epoch


def better(costs: Floats, violations: Floats, candidate: int) -> int:
    """How many points of a cohort come before one of them: those that violate the constraints less (0 is feasible), and
    among equal violation those of a better Pareto rank (Deb et al. 2002, NSGA-II, sections III.A and VI).

    Within a rank none comes before the other: which trade-off is worth more is not for early stopping to say.

    Args:
        costs: (n, m), smaller is better; NaN is worst.
        violations: (n,), 0 or more.
        candidate: index of the point.

    Returns:
        0 to n - 1.
    """
    before = int(np.sum(violations < violations[candidate]))
    left = np.flatnonzero(violations == violations[candidate])
    most = np.finfo(np.float64).max
    costs = np.nan_to_num(costs, nan=most, posinf=most, neginf=-most)
    if costs.shape[1] == 2:
        ranks = _ranks(costs[left])
        return before + int(np.sum(ranks < ranks[left == candidate]))
    while True:
        on_front = front_mask(costs[left])
        if candidate in left[on_front]:
            return before
        before += int(on_front.sum())
        left = left[~on_front]


def _ranks(costs: Floats) -> npt.NDArray[np.int64]:
    """Pareto ranks of finite points of two costs, (n, 2), from 0 on: a sweep, where peeling takes a pass a front.

    In lexicographic order an earlier point of a rank dominates a later one if the least second cost of that rank is not
    above its own (Jensen 2003, on two objectives). Equal points have equal ranks.
    """
    ranks = np.zeros(len(costs), dtype=np.int64)
    least: list[float] = []  # of each rank; grows with it
    last, rank = None, 0
    order = np.lexsort(costs.T[::-1])
    for place, point in zip(order.tolist(), costs[order].tolist(), strict=True):
        if point != last:
            last, rank = point, bisect_right(least, point[1])
            least[rank : rank + 1] = [point[1]]
        ranks[place] = rank
    return ranks


def violation(constraints: Sequence[Constraint], metrics: Mapping[str, float]) -> float:
    """By how much the constraints are violated together, 0 if they hold; infinite where a metric is missing."""
    return sum(max(0.0, constraint.excess(metrics.get(constraint.metric, math.nan))) for constraint in constraints)


@dataclass(frozen=True)
class RungTable:
    """What every trial measured at every rung. The first value of a trial at a step counts, repeated ones do not.

    Attributes:
        objectives: of the study.
        constraints: of the study.
        stopping: its settings.
        rows: by step, then by trial key in the order of arrival.
    """

    objectives: Sequence[Objective]
    constraints: Sequence[Constraint]
    stopping: EarlyStopping
    rows: dict[int, dict[str, Mapping[str, float]]] = field(default_factory=dict)

    def add(self, key: str, step: int, metrics: Mapping[str, float]) -> None:
        """Enter a trial's measurements at a step."""
        self.rows.setdefault(step, {}).setdefault(key, metrics)

    def of(self, key: str) -> dict[int, Mapping[str, float]]:
        """A trial's measurements by step."""
        return {step: rows[key] for step, rows in self.rows.items() if key in rows}

    def stop_reason(self, key: str, step: int) -> str | None:
        """Why the trial must stop at this step, or None if it goes on.

        It is compared with the last `COHORT` that were at the step before it, so the answer does not change afterwards.
        """
        if not self.stopping.enabled:
            return None
        keys = list(self.rows[step])
        place = keys.index(key) + 1
        keys = keys[max(0, place - COHORT) : place]
        cohort = [self.rows[step][other] for other in keys]
        costs = oriented([[row.get(o.metric, math.nan) for o in self.objectives] for row in cohort], self.objectives)
        violations = np.array([violation(self.constraints, row) for row in cohort])
        before = better(costs, violations, len(keys) - 1)
        if before < len(keys) / self.stopping.eta:
            return None
        return f"stopped at step {step}: {before} of {len(keys) - 1} trials were better there"
