"""A study without training: trials from a formula, time from a virtual clock, everything else as it is.

`Surrogate` says what a trial would measure, epoch by epoch, and what it would cost; its few numbers are fitted to
trials that were run (`fit`). `simulate` runs a study on it with the ledger, the searcher and the early stopping of real
studies, on slots that work side by side in virtual time.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from scipy.optimize import least_squares

from study.front.dominance import Floats
from study.ledger.attempts import lost_seconds
from study.ledger.ledger import Ledger
from study.records import Manifest
from trainables.config import Model, Point, Protocol, TrialConfig
from trainables.execution.worker import Patience
from trainables.results import Attempt, Cause, Metric, Outcome, TrialResult
from trainables.trial import closing


@dataclass(frozen=True)
class Report:
    """What a trial reports after an epoch.

    Attributes:
        device_seconds: held since it began.
        metrics: of the small evaluation, or, after the last epoch, of the full one.
    """

    device_seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Course:
    """What a trial will do.

    Attributes:
        reports: one for each epoch that it ends.
        broken: how it ends after them if it does not end by itself: at a point that cannot work, or with lost workers.
        broken_after: device-seconds held by then.
    """

    reports: list[Report]
    broken: Literal["infeasible", "failed"] | None = None
    broken_after: float = 0.0


class Surrogate(Model):
    """Clean and robust recall of a fine-tuned model as a formula of its point.

    With the training attack's image strength `a = q(steps) epsilon / epsilon of the evaluation` and its text strength
    `b = words / words of the evaluation`, weight `w` and temperature `tau`,

        clean  = base * exp(-harm * (w^1.5 (a + b) / 2) ^ harm_power * (tau / 0.06) ^ -harm_temperature)
        robust = clean * (kept + (1 - kept) * (1 - exp(-gain * w a (1 + b) / 2 * (tau / 0.06) ^ gain_temperature)))

    A stronger attack costs clean recall faster than linearly and gains robustness less than linearly, the anchor loss
    (w below 1) keeps more of the one than it loses of the other, and at w = 0 neither happens. Training begins at the
    base model and comes near its end exponentially. Recall is a share of queries, so it has binomial noise, more in the
    small gallery of a rung. The defaults are fitted to the quickstart study.
    """

    base: float = 0.96
    harm: float = 0.36
    harm_power: float = 1.9
    harm_temperature: float = 0.44
    kept: float = 0.06
    gain: float = 0.19
    gain_temperature: float = 0.31
    start_seconds: float = 3.0
    epoch_seconds: float = 1.6
    step_seconds: float = 0.4
    evaluation_seconds: float = 4.0
    speed: float = 2.0
    noise: float = 1.0
    lost_rate: float = 0.02
    out_of_memory_rate: float = 0.005
    seed: int = 0

    def final(self, point: Point, protocol: Protocol) -> tuple[float, float]:
        """Clean and robust recall after the whole training, without noise."""
        weight, heat = point.contrastive_weight, math.log(point.temperature / 0.06)
        image = (1 - math.exp(-point.attack_steps)) / (1 - math.exp(-2)) * point.epsilon / protocol.epsilon
        text = point.words / max(1, protocol.words)
        pressure = weight**1.5 * (image + text) / 2
        clean = self.base * math.exp(-self.harm * pressure**self.harm_power * math.exp(-self.harm_temperature * heat))
        push = self.gain * weight * image * (1 + text) / 2 * math.exp(self.gain_temperature * heat)
        return clean, clean * (self.kept + (1 - self.kept) * (1 - math.exp(-push)))

    def diverges(self, point: Point) -> bool:
        """Whether the loss blows up: a large gradient, which goes with `w / tau`, under a strong attack."""
        return point.contrastive_weight / point.temperature > 40 and point.epsilon > 5 / 255

    def seconds(self, point: Point, epochs: int) -> list[float]:
        """Device-seconds held at the end of each epoch; the last one has the full evaluation."""
        epoch = self.epoch_seconds + self.step_seconds * point.attack_steps
        held = [self.start_seconds + epoch * done for done in range(1, epochs + 1)]
        return [*held[:-1], held[-1] + self.evaluation_seconds]

    def course(self, trial: TrialConfig) -> Course:
        """What the trial will do; the same for the same trial."""
        point, protocol, epochs = trial.point, trial.protocol, trial.training.epochs
        rng = np.random.default_rng([self.seed, trial.seed, zlib.crc32(point.model_dump_json().encode())])
        held = self.seconds(point, epochs)
        if rng.random() < self.out_of_memory_rate:
            return Course([], "infeasible", self.start_seconds)
        if rng.random() < self.lost_rate:  # one epoch is done twice
            held = [seconds + held[0] for seconds in held]
        reports: list[Report] = []
        ends = self.final(point, protocol)
        for epoch, seconds in enumerate(held, 1):
            if epoch == min(2, epochs) and self.diverges(point):
                return Course(reports, "infeasible", seconds)
            done = (1 - math.exp(-self.speed * epoch / epochs)) / (1 - math.exp(-self.speed))
            last = epoch == epochs
            rung = protocol if last else protocol.rung(epoch / epochs, protocol.gallery_images)
            images = rung.gallery_images
            ease = math.log(images) / math.log(protocol.gallery_images)  # among fewer images, each query is easier
            metrics: dict[str, float] = {}
            for target, begin, end in (("clean", self.base, ends[0]), ("both", self.base * self.kept, ends[1])):
                value = (begin + (end - begin) * done) ** ease
                spread = self.noise * math.sqrt(max(value * (1 - value), 1e-4) / (3 * images))  # queries are correlated
                value = float(np.clip(value + spread * rng.standard_normal(), 0, 1))
                metrics |= {f"{target}/mr_r{k}": value for k in protocol.recall_at}
            reports.append(Report(seconds, metrics))
        return Course(reports)


def fit(manifests: Sequence[Manifest], protocol: Protocol, recall: str = "mr_r5", epochs: int = 3) -> Surrogate:
    """The surrogate whose recalls and costs are nearest to those of trials that were run.

    Args:
        manifests: of complete trials; others are left out. Some should differ in radius, some in temperature.
        protocol: that they were measured with.
        recall: which recall is the surrogate's.
        epochs: that they were trained for.

    Raises:
        ValueError: there are fewer than four complete trials.
    """
    complete = [manifest for manifest in manifests if manifest.state == "complete"]
    if len(complete) < 4:
        raise ValueError(f"fitting the simulator takes four complete trials or more, there are {len(complete)}")
    points = [Point.model_validate(manifest.point) for manifest in complete]
    targets = [[manifest.metrics[f"{name}/{recall}"].value for name in ("clean", "both")] for manifest in complete]
    names = ("base", "harm", "harm_power", "harm_temperature", "kept", "gain", "gain_temperature")
    start = Surrogate()

    def residuals(values: Floats) -> Floats:
        model = start.model_copy(update=dict(zip(names, values.tolist(), strict=True)))
        found = np.array([model.final(point, protocol) for point in points])
        # Robust recall is the smaller and the more interesting one.
        return np.concatenate([((found - np.array(targets)) * [1, 3]).ravel(), 0.01 * (values - initial)])

    initial = np.array([getattr(start, name) for name in names])
    high = [1, 10, 4, 2, 0.9, 10, 2]
    solution = least_squares(residuals, initial, bounds=([0.01] * 2 + [0.5, 0, 0, 0.001, 0], high)).x
    found = dict(zip(names, solution.tolist(), strict=True))
    steps = np.array([point.attack_steps for point in points], dtype=float)
    seconds = np.array([m.cost["device_seconds"] - lost_seconds(m.attempts) for m in complete])
    slope, rest = np.polyfit(steps, seconds, 1) if len(set(steps)) > 1 else (0.0, float(seconds.mean()))
    share = max(rest, 1.0) / (start.start_seconds + epochs * start.epoch_seconds + start.evaluation_seconds)
    found |= {"step_seconds": max(0.0, float(slope)) / epochs}
    parts = ("start_seconds", "epoch_seconds", "evaluation_seconds")
    return start.model_copy(update=found | {name: share * getattr(start, name) for name in parts})


class Clock:
    """Virtual time, in seconds."""

    now = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def simulate(
    ledger: Ledger,
    template: TrialConfig,
    course: Callable[[TrialConfig], Course],
    slots: int,
    clock: Clock,
) -> Iterator[Manifest]:
    """Run a study in virtual time until its budget is spent, or until nobody asks for more.

    Args:
        ledger: the study, with the clock.
        template: what all trials share.
        course: what a trial does.
        slots: trials that run side by side, each on the devices of its workers.
        clock: is moved.

    Yields:
        Each trial that has ended, at that time.
    """
    from study.execution.tune_searcher import LedgerSearcher

    make = partial(ledger.trial, template)
    searcher = LedgerSearcher(ledger, make, Patience(), lambda: True, lambda record, what: None, clock)
    queue: list[tuple[float, int, float, dict[str, Any], Iterator[tuple[float, dict[str, Any]]]]] = []

    def begin(number: int) -> bool:
        suggested = searcher.suggest(str(number))
        if not isinstance(suggested, dict):
            return False
        trial = TrialConfig.model_validate(suggested["trial"])
        results = _results(trial, course(trial))
        held, result = next(results)
        heapq.heappush(queue, (clock.now + held, number, clock.now, result, results))
        return True

    begun = 0
    while len(queue) < slots and begin(begun):
        begun += 1
    while queue:
        clock.now, number, since, result, results = heapq.heappop(queue)
        if "outcome" not in result and searcher.rung(str(number), result):
            held, result = next(results)
            heapq.heappush(queue, (since + held, number, since, result, results))
        else:
            searcher.on_trial_complete(str(number), result)
            yield ledger.manifests()[-1]
            while len(queue) < slots and begin(begun):
                begun += 1


def _results(trial: TrialConfig, course: Course) -> Iterator[tuple[float, dict[str, Any]]]:
    """What the trial would report to Ray Tune, each with the seconds since it began."""
    held, devices = 0.0, trial.workers.count * trial.workers.share
    for epoch, report in enumerate(course.reports, 1):
        held = report.device_seconds
        last = epoch == trial.training.epochs
        fixed = {"step": epoch, "epoch": epoch, "last": last, "resumed_from_step": -1, "history": "[]"}
        yield held / devices, {**fixed, **report.metrics, "device_seconds": held}
    if course.broken is not None:
        outcome = Outcome(state=course.broken, reason="simulated")
        broken_after = course.broken_after / devices
        yield broken_after, closing(_attempt(devices, broken_after, outcome), outcome)
        return
    result = TrialResult(
        metrics={
            name: Metric(value=value, low=value, high=value) for name, value in course.reports[-1].metrics.items()
        },
        split=trial.data.eval_split,
        correct={},
        queries={},
        device_seconds=held,
        seconds={},
        steps=trial.training.epochs,
        resumed_from_steps=[],
        temperature=trial.point.temperature,
        hashes={},
        versions={},
    )
    outcome = Outcome(state="complete", result=result)
    yield held / devices, closing(_attempt(devices, held / devices, outcome), outcome)


def _attempt(devices: float, seconds: float, outcome: Outcome) -> Attempt:
    causes: dict[str, Cause] = {"complete": "complete", "infeasible": "point", "failed": "bug"}
    return Attempt(began=0, ended=seconds, devices=devices, cause=causes[outcome.state])
