"""What is kept as one trial ends after the other is what is found from all of them at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from study.config import Objective
from study.front.dominance import Archive, cost_of, front_mask
from study.front.estimates import Members, front
from study.front.hypervolume import REFERENCE, History, Volume, hypervolume_history
from study.records import Manifest
from trainables.results import Metric

OBJECTIVES = (
    Objective(metric="clean/mr_r5"),
    Objective(metric="cost/device_seconds", direction="minimize", low=0, high=100),
    Objective(metric="both/mr_r5", low=0.1, high=0.9),
    Objective(metric="text/mr_r5"),
)
VALUES = [*np.linspace(-0.1, 1.1, 13), np.nan, np.inf, -np.inf]
"""Coarse, so that ties and duplicates are common; some are out of the box."""


def drawn(rng: np.random.Generator, runs: int, objectives: tuple[Objective, ...]) -> list[Manifest]:
    """Manifests in the order they ended: replicates come late or before their first run, some end otherwise."""
    identities = [(number, replicate) for number in range(runs) for replicate in range(int(rng.integers(1, 4)))]
    manifests = []
    for ended, (number, replicate) in enumerate(rng.permutation(identities).tolist()):
        half = float(rng.choice([0.0, 0.02, 0.3]))
        values = rng.choice(VALUES, len(OBJECTIVES), p=[*[0.97 / 13] * 13, 0.01, 0.01, 0.01])
        state = rng.choice(["complete", "stopped", "infeasible", "failed"], p=[0.8, 0.1, 0.05, 0.05])
        metrics = {
            objective.metric: Metric(value=value, low=value - half, high=value + half)
            for objective, value in zip(OBJECTIVES, values.tolist(), strict=True)
        }
        manifests.append(
            Manifest.model_construct(
                key=f"s-t{number:05d}-s{replicate}",
                number=100 * replicate + number,
                recipe=None,
                replicate=replicate,
                params={},
                state=str(state),
                metrics=metrics,
                cost={"device_seconds": 100 * float(values[1])} if np.isfinite(values[1]) else {},
                ended=float(ended),
            )
        )
    return manifests


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_members_and_history_are_those_of_all_trials_at_once(axes: int) -> None:
    rng, objectives = np.random.default_rng(axes), OBJECTIVES[:axes]
    for _ in range(60):
        manifests = drawn(rng, int(rng.integers(1, 12)), objectives)
        members, history = Members(objectives), History(objectives)
        before = front([], objectives)
        for count, manifest in enumerate(manifests, 1):
            moved = members.add(manifest)
            history.add(manifest)
            now = front(manifests[:count], objectives)
            assert members.keys == {entry.key for entry in now}
            assert moved or now == before
            before = now
        assert history.rows == hypervolume_history(manifests[::-1], objectives)
        complete = [one.state == "complete" for one in manifests]
        assert history.shares == [row[3] for row, whole in zip(history.rows, complete, strict=True) if whole]
        firsts = [one for one, whole in zip(manifests, complete, strict=True) if whole and not one.replicate]
        costs = np.array([cost_of(one, objectives) for one in firsts]).reshape(-1, axes)
        assert history.rows[-1][3] == pytest.approx(slices(costs) / REFERENCE**axes, abs=1e-10)


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_an_archive_is_the_front_of_what_is_in_it(axes: int) -> None:
    rng = np.random.default_rng(axes)
    for _ in range(100):
        archive, costs = Archive(axes), np.full((200, axes), np.nan)
        for _ in range(40):
            place, cost = int(rng.integers(0, 200)), rng.choice([0.0, 0.2, 0.5, 0.9, np.nan, np.inf], axes)
            archive.put(place, cost)
            costs[place] = cost
            assert archive.places == np.flatnonzero(front_mask(costs)).tolist()


def slices(costs: np.ndarray) -> float:
    """The volume of a union of boxes by its cells: on each axis, the points' own coordinates are the edges."""
    inside = np.maximum(costs[np.isfinite(costs).all(axis=1) & (costs < REFERENCE).all(axis=1)], 0)
    edges = [np.append(np.unique(inside[:, axis]), REFERENCE) for axis in range(costs.shape[1])]
    cells = itertools.product(*(range(len(each) - 1) for each in edges))
    return sum(
        np.prod([each[place + 1] - each[place] for each, place in zip(edges, cell, strict=True)])
        for cell in cells
        if (inside <= [each[place] for each, place in zip(edges, cell, strict=True)]).all(axis=1).any()
    )


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_volume_grows_by_what_each_point_adds(axes: int) -> None:
    rng = np.random.default_rng(axes)
    for repeat in range(16):
        costs = rng.random((9, axes)) * 1.2 - 0.05
        if repeat % 2:
            costs = np.round(costs, 1)
        costs[rng.random(9) < 0.05] = np.nan
        volume, total = Volume(axes), 0.0
        for count, cost in enumerate(costs, 1):
            total += volume.add(cost)
            if count in (3, 6, 9):
                assert total == pytest.approx(slices(costs[:count]), abs=1e-10)


def test_a_front_of_thousands_is_taken_up_point_by_point() -> None:
    rng = np.random.default_rng(0)
    values = np.abs(rng.standard_normal((800, 4)))
    costs = 1 - values / np.linalg.norm(values, axis=1)[:, None]
    volume = Volume(4)
    total = sum(map(volume.add, costs))
    samples = rng.random((20_000, 4)) * REFERENCE
    inside = np.mean([(costs <= sample).all(axis=1).any() for sample in samples])
    assert total / REFERENCE**4 == pytest.approx(inside, abs=0.015)
    assert sum(map(Volume(4).add, costs[rng.permutation(800)])) == pytest.approx(total, abs=1e-9)
