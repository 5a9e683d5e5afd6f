"""What a front is worth: its hypervolume, how that grew, and what several seeds attain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from study.config import Objective
from study.front.dominance import Floats, cost_of
from study.records import Manifest

REFERENCE = 1.1
"""Reference point on every axis: 10 % of the range beyond the worse end."""


class Volume:
    """The volume that points dominate, between 0 and the reference on every axis, as one comes after the other. Exact.

    What no point dominates is the union of the boxes below the local upper bounds. A new point splits those bounds
    that it is below, few of many, and each bound has a part of the dominated volume (Lacour, Klamroth and Fonseca 2017,
    "A box decomposition algorithm to compute the hypervolume indicator"; Klamroth, Lacour and Vanderpooten 2015, "On
    the representation of the search region in multi-objective optimization"). Of equal costs the later counts as the
    worse, as if it were a little so.

    Args:
        axes: 1 or more.
        reference: the same on every axis.
    """

    def __init__(self, axes: int, reference: float = REFERENCE) -> None:
        self._reference, self._axes = reference, axes
        self._bounds = np.full((axes, 1), reference)  # an axis each row
        self._points: Floats = reference * np.eye(axes)[None]  # of a bound, the one that bounds it on each axis
        self._free: list[int] = []

    def add(self, cost: Floats) -> float:
        """How much more is dominated with this point. Costs below 0 count as 0; one at the reference adds nothing."""
        point = np.maximum(cost, 0.0)
        hit = np.flatnonzero(np.logical_and.reduce(self._bounds > point[:, None]))  # none for NaN
        if not len(hit):
            return 0.0
        bounds, points = self._bounds[:, hit].T, self._points[hit]
        parts = []
        for axis in range(self._axes):
            others = np.delete(points[:, :, axis], axis, axis=1)
            kept = (others <= point[axis]).all(axis=1)
            below, by = bounds[kept], points[kept]
            below[:, axis], by[:, axis] = point[axis], point
            parts.append((below, by))
        new_bounds, new_points = (np.concatenate(part) for part in zip(*parts, strict=True))
        self._bounds[:, hit] = -1.0  # below no point
        self._free += hit.tolist()
        if len(self._free) < len(new_bounds):
            before, more = len(self._points), max(len(new_bounds), len(self._points))
            self._free = [*range(before, before + more), *self._free]
            self._bounds = np.hstack([self._bounds, np.full((self._axes, more), -1.0)])
            self._points = np.concatenate([self._points, np.zeros((more, self._axes, self._axes))])
        places = [self._free.pop() for _ in new_bounds]
        self._bounds[:, places], self._points[places] = new_bounds.T, new_points
        return self._parts(new_bounds, new_points) - self._parts(bounds, points)

    def _parts(self, bounds: Floats, points: Floats) -> float:
        """What is dominated beside these bounds, each with its own part."""
        floors = np.maximum.accumulate(points, axis=1)
        volumes = self._reference - bounds[:, 0]
        for axis in range(1, self._axes):
            volumes = volumes * np.maximum(bounds[:, axis] - floors[:, axis - 1, axis], 0.0)
        return float(volumes.sum())


def hypervolume(costs: Floats, reference: float = REFERENCE) -> float:
    """Volume that the points dominate, see `Volume`.

    Args:
        costs: (n, m), m >= 1.
        reference: the same on every axis.

    Returns:
        A volume in [0, reference ** m].
    """
    volume = Volume(costs.shape[1], reference)
    return sum(map(volume.add, costs))


def hypervolume_share(costs: Floats, reference: float = REFERENCE) -> float:
    """Hypervolume as a share of the whole box, in [0, 1]."""
    box: float = reference ** costs.shape[1]
    return hypervolume(costs, reference) / box


def attainment(fronts: Sequence[Floats], level: float) -> Floats:
    """The empirical attainment surface of several runs with two objectives (Watanabe 2023, arXiv 2305.08852).

    Args:
        fronts: costs of each run's points, (n, 2).
        level: share of the runs that must reach what lies beyond the surface, in (0, 1]; 0.5 is the median.

    Returns:
        (k, 2): for each first cost at which a run has a point, the smallest second cost that the share of runs reaches
        there; infinite where fewer reach any.
    """
    firsts = np.unique(np.concatenate([costs[:, 0] for costs in fronts]))
    reached = [[np.min(costs[costs[:, 0] <= first, 1], initial=math.inf) for first in firsts] for costs in fronts]
    needed = math.ceil(level * len(fronts) - 1e-9)
    return np.column_stack([firsts, np.sort(reached, axis=0)[needed - 1]])


Row = tuple[float, int, float, float]
"""Of an ended trial: when it ended, trials ended so far, device-seconds held so far, hypervolume share."""


class History:
    """How the front grew, as one trial ends after the other.

    A point counts as it was measured first. Replicates, and trials that were stopped, infeasible or failed, add no
    volume, but they count and their device-seconds do.

    Args:
        objectives: of the study.
        manifests: what ended before, in the order they ended.

    Attributes:
        rows: one for each ended trial.
        shares: the last column for the complete ones alone.
    """

    def __init__(self, objectives: Sequence[Objective], manifests: Iterable[Manifest] = ()) -> None:
        self.rows: list[Row] = []
        self.shares: list[float] = []
        self._objectives = objectives
        self._volume, self._share, self._seconds = Volume(len(objectives)), 0.0, 0.0
        for manifest in manifests:
            self.add(manifest)

    def add(self, manifest: Manifest) -> None:
        """The next one that ended."""
        self._seconds += float(manifest.cost.get("device_seconds", 0.0))
        if manifest.state == "complete":
            if not manifest.replicate:
                cost = cost_of(manifest, self._objectives)
                box = REFERENCE ** len(cost)
                self._share += self._volume.add(cost) / box if np.isfinite(cost).all() else 0.0
            self.shares.append(self._share)
        self.rows.append((manifest.ended, len(self.rows) + 1, self._seconds, self._share))


def hypervolume_history(manifests: Sequence[Manifest], objectives: Sequence[Objective]) -> list[Row]:
    """Rows of `History` for these trials, in the order they ended."""
    return History(objectives, sorted(manifests, key=lambda manifest: (manifest.ended, manifest.key))).rows
