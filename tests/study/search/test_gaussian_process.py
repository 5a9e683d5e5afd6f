"""The posterior is the textbook's, and its shape is found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from threadpoolctl import threadpool_limits

from study.search import gaussian_process
from study.search.gaussian_process import GaussianProcess

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def textbook(left: Any, right: Any, shape: Any) -> Any:
    """The covariance, pair by pair."""
    lengths, single = np.exp(shape[:-2]), 1 / (1 + math.exp(-shape[-2]))

    def matern(distance: float) -> float:
        root = math.sqrt(5) * distance
        return (1 + root + root**2 / 3) * math.exp(-root)

    return np.array(
        [
            [
                single * np.mean([matern(abs(d)) for d in (a - b) / lengths])
                + (1 - single) * matern(math.sqrt((((a - b) / lengths) ** 2).sum()))
                for b in right
            ]
            for a in left
        ]
    )


def test_the_posterior_is_the_textbooks() -> None:
    points, further = RNG.random((15, 3)), RNG.random((6, 3))
    values, extra = RNG.random(15) + points[:, 0], 0.01 * RNG.random(15)
    process = GaussianProcess.fit(points, values, extra)
    noise = math.exp(process.shape[-1])
    variance = values.var()
    inverse = np.linalg.inv(textbook(points, points, process.shape) + np.diag(noise + extra / variance))
    across = textbook(further, points, process.shape)
    mean, deviation = process.predict(further)
    expected = values.mean() + across @ inverse @ (values - values.mean())
    np.testing.assert_allclose(mean, expected, rtol=1e-9)
    doubt = np.sqrt(variance * (1 - np.diag(across @ inverse @ across.T)))
    np.testing.assert_allclose(deviation, doubt, rtol=1e-7)


def test_a_point_that_is_measured_changes_no_mean_and_takes_doubt_away() -> None:
    points, running, further = RNG.random((12, 2)), RNG.random((3, 2)), RNG.random((40, 2))
    values = np.sin(4 * points[:, 0]) + points[:, 1]
    process = GaussianProcess.fit(points, values, np.zeros(12))
    more = process.with_mean_at(running)
    np.testing.assert_allclose(more.predict(further)[0], process.predict(further)[0], rtol=1e-9)
    assert (more.predict(further)[1] <= process.predict(further)[1] + 1e-12).all()
    assert (more.predict(running)[1] < 0.7 * process.predict(running)[1]).all()
    # As if the means had been measured there.
    whole = np.vstack([points, running])
    noisy = textbook(whole, whole, process.shape) + math.exp(process.shape[-1]) * np.eye(15)
    across = textbook(further, whole, process.shape)
    doubt = values.std() * np.sqrt(1 - np.einsum("ij,jk,ik->i", across, np.linalg.inv(noisy), across))
    np.testing.assert_allclose(more.predict(further)[1], doubt, rtol=1e-6)
    assert process.with_mean_at(running[:0]) is process


def test_the_gradient_is_that_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[Any] = []

    def keep(loss: Any, start: Any, **options: Any) -> Any:
        losses.append(loss)
        return original(loss, start, **options)

    original = gaussian_process.minimize
    monkeypatch.setattr(gaussian_process, "minimize", keep)
    points = RNG.random((20, 4))
    GaussianProcess.fit(points, RNG.random(20), 0.01 * RNG.random(20))
    for place in 0.5 * RNG.standard_normal((3, 6)):
        numeric = approx_fprime(place, lambda shape: losses[0](shape)[0], 1e-6)
        np.testing.assert_allclose(losses[0](place)[1], numeric, rtol=1e-3, atol=1e-4)


def test_it_finds_what_matters_and_how_noisy_it_is() -> None:
    points = RNG.random((150, 5))
    truth = np.sin(6 * points[:, 1]) + points[:, 3]
    values = truth + 0.1 * RNG.standard_normal(150)
    process = GaussianProcess.fit(points, values, np.zeros(150))
    assert set(np.argsort(process.shape[:5])[:2]) == {1, 3}
    assert math.sqrt(math.exp(process.shape[-1])) * process.scale == pytest.approx(0.1, rel=0.3)
    further = RNG.random((500, 5))
    mean, deviation = process.predict(further)
    off = np.abs(mean - np.sin(6 * further[:, 1]) - further[:, 3])
    assert off.mean() < 0.07
    assert (off < 2 * deviation).mean() > 0.85
    # A value with much variance of its own counts little.
    wrong, extra = values.copy(), np.zeros(150)
    wrong[:30] += 5
    extra[:30] = 100
    trusting = GaussianProcess.fit(points, wrong, np.zeros(150)).predict(further)[0]
    warned = GaussianProcess.fit(points, wrong, extra).predict(further)[0]
    assert np.abs(warned - mean).mean() < 0.2 * np.abs(trusting - mean).mean()


def test_many_points_count_all_though_some_tell_the_shape() -> None:
    points = RNG.random((400, 2))
    values = np.sin(5 * points[:, 0]) + points[:, 1]
    process = GaussianProcess.fit(points, values, np.zeros(400))
    assert process.factor.shape == (400, 400)
    mean, deviation = process.predict(points)
    half = GaussianProcess.fit(points[::3], values[::3], np.zeros(134))
    np.testing.assert_allclose(mean, values, atol=0.02)
    assert deviation.mean() < 0.8 * half.predict(points)[1].mean()


@pytest.mark.parametrize("count", [1, 2])
def test_few_and_equal_values_are_no_problem(count: int) -> None:
    process = GaussianProcess.fit(RNG.random((count, 3)), np.ones(count), np.zeros(count))
    mean, deviation = process.predict(RNG.random((5, 3)))
    assert mean == pytest.approx(np.ones(5))
    assert np.isfinite(deviation).all()
    assert (deviation > 0).all()
