"""The simulator: like the trials that were run, the same every time, and driven by the code of real studies."""

from __future__ import annotations

from itertools import islice

import pytest

from study.config import COST, Budget, EarlyStopping, Objective, StudyConfig
from study.execution.simulator import Clock, Course, Report, Surrogate, fit, simulate
from study.ledger.ledger import Ledger
from study.records import Manifest
from trainables.config import Point, Protocol, TrainingConfig, TrialConfig
from trainables.results import Metric

EPS = 1 / 255
RECORDED = [  # quickstart trials: point, clean and robust recall at 5, device-seconds
    (Point(temperature=0.06), 0.96, 0.06, 13.0),
    (Point(temperature=0.06, epsilon=2 * EPS, attack_steps=2, words=1), 0.67, 0.15, 16.0),
    (Point(temperature=0.15, epsilon=2 * EPS, attack_steps=2, words=1), 0.755, 0.205, 16.0),
    (Point(temperature=0.06, epsilon=6 * EPS, attack_steps=3, words=1), 0.25, 0.12, 17.0),
    (Point(contrastive_weight=0, temperature=0.06, epsilon=2 * EPS, attack_steps=10), 0.97, 0.05, 25.0),
]


def recorded() -> list[Manifest]:
    return [
        Manifest(
            key=f"q-t{number:05d}-s0",
            number=number,
            recipe=None,
            params={},
            point=point.model_dump(mode="json"),
            state="complete",
            metrics={
                name: Metric(value=value, low=value, high=value)
                for name, value in (("clean/mr_r5", clean), ("both/mr_r5", both))
            },
            cost={"device_seconds": seconds},
            fingerprint="f",
            ended=float(number),
        )
        for number, (point, clean, both, seconds) in enumerate(RECORDED)
    ]


@pytest.mark.parametrize("model", [Surrogate(), fit(recorded(), Protocol())], ids=["default", "fitted"])
def test_it_is_like_the_trials_that_were_run(model: Surrogate) -> None:
    for point, clean, both, seconds in RECORDED:
        assert model.final(point, Protocol()) == (pytest.approx(clean, abs=0.06), pytest.approx(both, abs=0.03))
        assert model.seconds(point, 3)[-1] == pytest.approx(seconds, abs=3)


def test_fitting_takes_enough_trials() -> None:
    with pytest.raises(ValueError, match="four complete trials or more, there are 3"):
        fit(recorded()[:3], Protocol())


def test_equal_trials_have_equal_courses_and_seeds_differ() -> None:
    trial = TrialConfig(point=RECORDED[1][0], training=TrainingConfig(epochs=3))
    model = Surrogate(lost_rate=0, out_of_memory_rate=0)
    assert model.course(trial) == model.course(trial)
    assert model.course(trial) != model.course(trial.model_copy(update={"seed": 1}))
    for report in model.course(trial).reports:
        assert all(0 <= value <= 1 for value in report.metrics.values())


def test_training_goes_from_the_base_to_the_end() -> None:
    still = Surrogate(noise=0, lost_rate=0, out_of_memory_rate=0)
    alike = Protocol(rung_growth=0)  # later galleries are not larger, so recalls are those of the training alone
    trial = TrialConfig(point=RECORDED[1][0], training=TrainingConfig(epochs=6), protocol=alike)
    course = still.course(trial)
    last = course.reports[-1].metrics
    assert (last["clean/mr_r5"], last["both/mr_r5"]) == pytest.approx(still.final(trial.point, trial.protocol))
    clean = [report.metrics["clean/mr_r5"] for report in course.reports[:-1]]
    both = [report.metrics["both/mr_r5"] for report in course.reports[:-1]]
    assert clean == sorted(clean, reverse=True)
    assert both == sorted(both)


def test_a_gradient_that_is_too_large_diverges_and_lost_workers_cost_an_epoch() -> None:
    wild = Point(temperature=0.011, epsilon=8 * EPS, attack_steps=2)
    course = Surrogate(lost_rate=0, out_of_memory_rate=0).course(TrialConfig(point=wild))
    assert course.broken == "infeasible"
    trial = TrialConfig(point=RECORDED[1][0])
    usual, lost = (Surrogate(lost_rate=rate, out_of_memory_rate=0).course(trial) for rate in (0, 1))
    assert lost.reports[-1].device_seconds > usual.reports[-1].device_seconds
    assert Surrogate(out_of_memory_rate=1).course(trial).broken == "infeasible"


def planned(trial: TrialConfig) -> Course:
    """Two epochs of ten seconds; a trial is as good as its contrastive weight."""
    value = trial.point.contrastive_weight
    metrics = {"clean/mr_r5": value, "both/mr_r5": value}
    return Course([Report(10.0, metrics), Report(20.0, metrics)], "failed" if trial.point.words == 2 else None, 25.0)


def settled(points: list[dict[str, float]], slots: int, most: int | None = None) -> tuple[Ledger, float]:
    config = StudyConfig(
        recipes=(),
        objectives=(Objective(metric="clean/mr_r5"), Objective(metric="both/mr_r5")),
        budget=Budget(trials=len(points)),
        early_stopping=EarlyStopping(eta=2),
        points=points,
    )
    clock = Clock()
    ledger = Ledger(config, None, "f", clock)
    trials = simulate(ledger, TrialConfig(training=TrainingConfig(epochs=3)), planned, slots, clock)
    assert list(islice(trials, most)) == ledger.manifests()
    return ledger, clock.now


def test_slots_work_side_by_side_in_virtual_time_and_rungs_stop() -> None:
    good, better, bad = ({"contrastive_weight": weight, "words": 0} for weight in (0.5, 0.9, 0.1))
    ledger, end = settled([good, better, bad], slots=2)
    ended = {manifest.number: (manifest.ended, manifest.state) for manifest in ledger.manifests()}
    # Two begin at 0; both pass the rung at 10, the better one coming last. The third begins at 20 and stops at 30.
    assert ended == {0: (20.0, "complete"), 1: (20.0, "complete"), 2: (30.0, "stopped")}
    assert end == 30.0
    assert [manifest.cost["device_seconds"] for manifest in ledger.manifests()] == [20.0, 20.0, 10.0]
    assert ledger.manifests()[2].rungs == {1: {"clean/mr_r5": 0.1, "both/mr_r5": 0.1, COST: 10.0}}


def test_failures_are_told_and_nothing_goes_on_unasked() -> None:
    ledger, _ = settled([{"contrastive_weight": 0.5, "words": 2}], slots=1)
    assert [(manifest.state, manifest.ended) for manifest in ledger.manifests()] == [("failed", 25.0)]
    ledger, end = settled([{"contrastive_weight": weight, "words": 0} for weight in (0.5, 0.6)], slots=1, most=1)
    assert [record.state for record in ledger.records()] == ["complete", "waiting"]
    assert end == 20.0
