"""The Gaussian-process sampler: the point that promises most growth of the hypervolume.

It learns from complete trials; from stopped and running ones by what their rungs say of the end; from infeasible ones
where not to go; and takes those that run to end as expected. What it proposes depends on what the trials that exist
measured and on nothing else: not on how long they took, which is never twice the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr
from scipy.stats import norm, qmc

from study.config import Objective
from study.front.dominance import Floats, oriented
from study.front.hypervolume import REFERENCE
from study.records import INFEASIBLE
from study.search.gaussian_process import GaussianProcess
from study.search.unit_box import UnitBox, Values

RAYS, NODES = 32, 12
"""Where growth is integrated: directions from the reference point, and places on each beyond the front."""

SPREAD, NEAR_FRONT = 512, 4
"""First candidates: over the whole space, and around each complete point that is feasible."""

DISTANCES, PARENTS, CHILDREN = (0.2, 0.05, 0.02, 0.005), 16, 24
"""Then, at each distance, children of the best candidates."""

ENOUGH = 10
"""Points for each feature that tell the shape of a function (Loeppky et al. 2009, "Choosing the sample size of a
computer experiment"). A process takes its shape for known; what fewer points say is doubted more than that, or the
first ones, such as recipes, which differ in little, would decide what is never tried."""

Rows = tuple[Floats, Floats]
"""Points of the unit box, (n, knobs), and a value of each, (n,)."""


@dataclass(frozen=True)
class Known:
    """What trials tell.

    Attributes:
        points: of complete trials, and of stopped and running ones whose rungs say something; rows of the unit box,
            (n, knobs).
        costs: what they came to, or would have, (n, objectives).
        extra: variance of these beyond that of a complete trial, (n, objectives).
        usable: which of them are complete and feasible, bool (n,).
        running: points of the trials that run, (k, knobs).
        limits: what must not be above 0: how far each constraint was exceeded.
    """

    points: Floats
    costs: Floats
    extra: Floats
    usable: npt.NDArray[np.bool_]
    running: Floats
    limits: list[Rows]


def read_trials(trials: Sequence[FrozenTrial], box: UnitBox, objectives: Sequence[Objective]) -> Known:
    """What is known from Optuna's trials, as the ledger writes them; those without a point of the space say nothing."""
    trials = [trial for trial in trials if box.contains(trial.params)]
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    broken = {trial.number for trial in ended if any(excess > 0 for excess in trial.constraints.values())}
    costs = {
        trial.number: oriented(trial.values, objectives)[0]
        for trial in ended
        if trial.state == TrialState.COMPLETE and np.isfinite(trial.values).all()
    }
    foretold = _foretold([*ended, *running], costs, broken, objectives)
    rows = [
        (
            trial,
            *(foretold[trial.number] if trial.number in foretold else (costs[trial.number], 0 * costs[trial.number])),
        )
        for trial in [*ended, *running]
        if trial.number in costs or trial.number in foretold
    ]
    names = {name for trial in ended for name in trial.constraints} - {INFEASIBLE}
    limits = [
        [(trial.params, trial.constraints[name]) for trial in ended if np.isfinite(trial.constraints.get(name, np.inf))]
        for name in sorted(names)
    ]
    if any(INFEASIBLE in trial.constraints for trial in ended):
        limits.append([(trial.params, 1.0 if INFEASIBLE in trial.constraints else -1.0) for trial in ended])
    shape = (len(rows), len(objectives))
    return Known(
        points=box.units([trial.params for trial, _, _ in rows]),
        costs=np.array([cost for _, cost, _ in rows]).reshape(shape),
        extra=np.array([extra for _, _, extra in rows]).reshape(shape),
        usable=np.array([trial.number in costs.keys() - broken for trial, _, _ in rows], dtype=bool),
        running=box.units([trial.params for trial in running]),
        limits=[_rows(box, limit) for limit in limits],
    )


def _rows(box: UnitBox, pairs: Sequence[tuple[Values, float]]) -> Rows:
    return box.units([point for point, _ in pairs]), np.array([value for _, value in pairs])


def _foretold(
    trials: Sequence[FrozenTrial], costs: dict[int, Floats], broken: set[int], objectives: Sequence[Objective]
) -> dict[int, tuple[Floats, Floats]]:
    """Final costs of trials that are not complete, and their variances, from the last rung of each."""
    rungs: dict[int, dict[int, Floats]] = {}
    for trial in trials:
        for step, values in trial.user_attrs.get("rungs", {}).items():
            if None not in values and np.isfinite(values).all():
                rungs.setdefault(int(step), {})[trial.number] = oriented(values, objectives)[0]
    found = {}
    missing = np.full(len(objectives), np.nan)
    for step in sorted(rungs):  # what a later rung says of a trial replaces what an earlier one said
        numbers = list(rungs[step])
        ends = np.array([costs.get(number, missing) for number in numbers])
        guesses = foretell(np.array([rungs[step][number] for number in numbers]), ends)
        for number, *guess in zip(numbers, *guesses, strict=True):
            if number not in costs and number not in broken and np.isfinite(guess).all():
                found[number] = guess[0], guess[1]
    return found


def foretell(early: Floats, late: Floats) -> tuple[Floats, Floats]:
    """What the costs at a rung say of the final ones.

    The pair is taken for normal. The line of late on early costs comes from the trials that have both; as early costs
    decide who goes on, it has no bias. The answer is the final cost that the early one measures, with the variance of
    that measurement: not the most probable one, for the process that it is given to has its own expectation.

    Args:
        early: costs at the rung, (n, objectives).
        late: final ones, NaN where there are none, (n, objectives).

    Returns:
        Final costs and variances, (n, objectives) each; NaN if fewer than two trials have both, or if the two do not
        go together.
    """
    both = np.isfinite(late).all(1)
    count = int(both.sum())
    if count < 2:
        return np.full_like(early, np.nan), np.full_like(early, np.nan)
    centre, target = early[both].mean(0), late[both].mean(0)
    off = early[both] - centre
    spread = (off**2).sum(0)
    doubt = spread / count + 1e-12  # weighs like one more trial, which says that the difference stays as it is
    slope = ((off * (late[both] - target)).sum(0) + doubt) / (spread + doubt)
    rest = ((late[both] - target - slope * off) ** 2).sum(0) / max(1, count - 2)
    mean, variance = early.mean(0), early.var(0) + 1e-12
    share = slope**2 * variance / (slope**2 * variance + rest)  # squared correlation
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = target + slope * (mean - centre) + slope / share * (early - mean)
        variances = (slope**2 * variance + rest) * (1 - share) / share
    return np.where(slope > 0, ends, np.nan), np.broadcast_to(variances, ends.shape)


def propose(known: Known, box: UnitBox, given: Values, rng: Generator) -> Floats:
    """The point that promises most.

    Args:
        known: with two complete trials or more.
        box: of the space.
        given: knobs whose values are not to be chosen.
        rng: of the candidates.

    Returns:
        Its row of the unit box, (knobs,).
    """
    features, running = box.features(known.points), box.features(known.running)
    processes = [
        GaussianProcess.fit(features, costs, extra).with_mean_at(running)
        for costs, extra in zip(known.costs.T, known.extra.T, strict=True)
    ]
    limits = [
        GaussianProcess.fit(box.features(points), values, np.zeros(len(values))) for points, values in known.limits
    ]
    found = np.vstack([features[known.usable], running])
    places, volumes = undominated(np.column_stack([process.predict(found)[0] for process in processes]))

    tried = {row.tobytes() for row in (*known.points, *known.running)}
    doubt = np.sqrt(1 + ENOUGH * features.shape[1] / len(features))

    def promise(units: Floats) -> Floats:
        rows = box.features(units)
        growth = volumes
        for process, costs in zip(processes, places.T, strict=True):
            mean, deviation = process.predict(rows)
            growth = growth * ndtr((costs - mean[:, None]) / (doubt * deviation[:, None]))
        total: Floats = growth.sum(1)
        for limit in limits:
            mean, deviation = limit.predict(rows)
            total = total * ndtr(-mean / deviation)
        return np.where([row.tobytes() in tried for row in units], -1.0, total)

    near = box.near(np.repeat(known.points[known.usable], NEAR_FRONT, 0), DISTANCES[0], rng)
    units = box.holding(np.vstack([box.snapped(rng.random((SPREAD, box.size))), near]), given)
    scores = promise(units)
    for distance in DISTANCES:
        best = np.argsort(-scores, kind="stable")[:PARENTS]
        children = box.holding(box.near(np.repeat(units[best], CHILDREN, 0), distance, rng), given)
        units, scores = np.vstack([units[best], children]), np.concatenate([scores[best], promise(children)])
    first: Floats = units[np.argmax(scores)]
    return first


def undominated(costs: Floats) -> Rows:
    """Places in the box before the reference point that no cost dominates, and the volume that each stands for.

    The expected growth of the hypervolume by a random point is the integral, over what is not dominated yet, of the
    probability that the point dominates the place. Places are on rays from the reference point, denser near the front.

    Args:
        costs: (n, objectives).

    Returns:
        Places, (q, objectives), and volumes up to a common factor, (q,).
    """
    objectives = costs.shape[1]
    if objectives == 2:
        angles = (np.arange(RAYS) + 0.5) / RAYS * np.pi / 2
        rays = np.column_stack([np.cos(angles), np.sin(angles)])
    else:
        draws = qmc.Halton(objectives, scramble=False).fast_forward(1).random(RAYS * objectives)
        rays = np.abs(norm.ppf(draws)) + 1e-9
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    gains = np.clip(REFERENCE - costs, 0, REFERENCE)
    inner = (gains[:, None] / rays).min(2).max(0, initial=0)
    length = (REFERENCE / rays).min(1) - inner
    part = (np.arange(NODES) + 0.5) / NODES
    radii = inner[:, None] + length[:, None] * part**2
    volumes = radii ** (objectives - 1) * length[:, None] * part
    return (REFERENCE - radii[:, :, None] * rays[:, None]).reshape(-1, objectives), volumes.ravel()
