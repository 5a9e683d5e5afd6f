"""Gaussian process regression, as small as the sampler needs it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import squareform
from scipy.special import expit

from study.front.dominance import Floats

LENGTH, SINGLE, NOISE = (-1.0, 0.5), (0.3, 0.7), (-5.0, 1.5)
"""Normal priors, mean and standard deviation: of the logarithm of a length scale, the logit of the part of the variance
that comes from single features, and the logarithm of the noise's variance. First points, such as recipes, often differ
in a few features only; where the first two priors are wide, the others then pass for known to have no effect."""

STARTS = (-1.2, 0.0)
"""Logarithms of the length scales that the search begins at."""

SHAPED = 150
"""Points that the shape is fitted to at most, spread over the order they are given in: enough to tell it, and the time
grows with the cube."""

BOUND = 10.0
"""Of all of these, so that no matrix is singular."""


@dataclass(frozen=True)
class GaussianProcess:
    """The posterior over a function of features, from noisy values at n points.

    The covariance has two parts: a Matern kernel (smoothness 5/2) of all features, and the mean of one for each feature
    alone (Duvenaud et al. 2011, "Additive Gaussian processes"), so that few points tell the main effects. Both have the
    same length scales. Values are standardised.

    Attributes:
        points: (n, features).
        shape: logarithms of the length scales, logit of the single part, logarithm of the noise, (features + 2,).
        factor: lower Cholesky factor of the covariance, (n, n).
        weights: inverse covariance times standardised values, (n,).
        mean: of the values.
        scale: of the values.
    """

    points: Floats
    shape: Floats
    factor: Floats
    weights: Floats
    mean: float
    scale: float

    @classmethod
    def fit(cls, points: Floats, values: Floats, extra: Floats) -> GaussianProcess:
        """With the shape of the highest posterior density.

        Args:
            points: (n, features), in [0, 1].
            values: (n,).
            extra: variance of each value beyond the noise that all have, (n,).
        """
        mean, scale = float(values.mean()), float(values.std()) or 1.0
        standard, extra = (values - mean) / scale, extra / scale**2
        count = points.shape[1]
        some = np.linspace(0, len(values) - 1, min(len(values), SHAPED)).astype(int)
        left, right = np.triu_indices(len(some), 1)  # covariances are symmetric, so half of the pairs are enough
        squared = (points[some[left]] - points[some[right]]).T ** 2
        own = np.eye(len(some)) + np.diag(extra[some])
        centre, width = np.array([*[LENGTH] * count, SINGLE, NOISE]).T

        def loss(shape: Floats) -> tuple[float, Floats]:
            """Negative log posterior density, and its gradient (Rasmussen and Williams 2006, section 5.4)."""
            scaled = squared * np.exp(-2 * shape[:count])[:, None]
            single, noise = float(expit(shape[count])), math.exp(shape[-1])
            (joint, joint_slope), (each, each_slope) = _matern(scaled.sum(0)), _matern(scaled)
            alone = each.mean(0)
            covariance = own + squareform(single * alone + (1 - single) * joint)
            factor, _ = cho_factor(covariance + noise * np.eye(len(some)), lower=True)
            inverse = cho_solve((factor, True), np.eye(len(some)))
            weights = inverse @ standard[some]
            rest = inverse - np.outer(weights, weights)
            off = (shape - centre) / width
            value = 0.5 * standard[some] @ weights + np.log(np.diag(factor)).sum() + 0.5 * off @ off
            slope = single / count * each_slope + (1 - single) * joint_slope
            pairs = rest[left, right]
            of_single = single * (1 - single) * pairs @ (alone - joint)
            gradient = [*-2 * (scaled * slope) @ pairs, of_single, 0.5 * noise * np.trace(rest)]
            return float(value), np.array(gradient) + off / width

        runs = [
            minimize(
                loss,
                np.array([*[start] * count, SINGLE[0], NOISE[0]]),
                jac=True,
                method="L-BFGS-B",
                bounds=[(-BOUND, BOUND)] * (count + 2),
                options={"maxiter": 50},
            )
            for start in STARTS
        ]
        shape = min(runs, key=lambda run: float(run.fun)).x
        noisy = _covariance(points, points, shape) + np.diag(math.exp(shape[-1]) + extra)
        factor, _ = cho_factor(noisy, lower=True)
        return cls(points, shape, np.tril(factor), cho_solve((factor, True), standard), mean, scale)

    def predict(self, points: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the function, without noise, at points (k, features); (k,) each."""
        across = _covariance(self.points, points, self.shape)
        known = solve_triangular(self.factor, across, lower=True)
        deviation = np.sqrt(np.maximum(1.0 - (known**2).sum(0), 1e-12))
        return self.mean + self.scale * (self.weights @ across), self.scale * deviation

    def with_mean_at(self, points: Floats) -> GaussianProcess:
        """The same mean, and as little doubt as if the points, (k, features), had been measured, too.

        So a point that is being measured is taken to turn out as expected (Ginsbourger et al. 2010, "Kriging is
        well-suited to parallelize optimization").
        """
        if not len(points):
            return self
        before, more = len(self.points), len(points)
        known = solve_triangular(self.factor, _covariance(self.points, points, self.shape), lower=True)
        own = _covariance(points, points, self.shape) + math.exp(self.shape[-1]) * np.eye(more) - known.T @ known
        factor = np.zeros((before + more, before + more))
        factor[:before, :before], factor[before:, :before] = self.factor, known.T
        factor[before:, before:] = np.linalg.cholesky(own)
        weights = np.concatenate([self.weights, np.zeros(more)])
        return GaussianProcess(np.vstack([self.points, points]), self.shape, factor, weights, self.mean, self.scale)


def _covariance(left: Floats, right: Floats, shape: Floats) -> Floats:
    single = float(expit(shape[-2]))
    joint, alone = np.zeros((2, len(left), len(right)))
    for one, other, length in zip(left.T, right.T, np.exp(shape[:-2]), strict=True):
        squared = ((one[:, None] - other) / length) ** 2
        joint += squared
        alone += _matern(squared)[0]
    covariance: Floats = single / left.shape[1] * alone + (1 - single) * _matern(joint)[0]
    return covariance


def _matern(squared: Floats) -> tuple[Floats, Floats]:
    """Matern 5/2 of squared distances, and its derivative by them."""
    distance = np.sqrt(5 * squared)
    decay = np.exp(-distance)
    return (1 + distance + 5 * squared / 3) * decay, -5 / 6 * (1 + distance) * decay
