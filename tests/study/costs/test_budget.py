"""Which limit ends a study, with its numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from study.config import Budget, Price
from study.costs.budget import (
    Usage,
    device_kind,
    ended_by,
    known_money,
    limits,
    money,
    planned_trials,
    reached,
    remaining_seconds,
    stagnation,
    usage,
)
from study.front.hypervolume import History
from study.records import Event, TrialRecord
from tests.study.helpers import complete, opened, run_next, study
from trainables.errors import InputError
from trainables.results import Outcome

PRICE = Price(device_hour={"l4": 2.0, "a100": 5.0}, head_hour=0.5)
USED = Usage(trials=3, planned_trials=12, wall_seconds=7200, held={"l4": 36000}, growth=[0.1, 0.3, 0.3, 0.3])


def running(number: int) -> TrialRecord:
    return TrialRecord(number, f"s-t{number:05d}-s0", "running", {}, None)


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({}, None),
        ({"wall_hours": 2.0}, "budget.wall_hours: 2 of 2 hours"),
        ({"wall_hours": 2.1}, None),
        ({"device_hours": 9.0, "wall_hours": 3.0}, "budget.device_hours: 10 of 9 device-hours"),
        ({"money": 21.0}, "budget.money: 21 of 21 USD"),
        ({"money": 21.1}, None),
        ({"plateau_trials": 2}, "budget.plateau_trials: 2 of 2 trials without growth"),
        ({"plateau_trials": 3}, None),
        ({"plateau_trials": 3, "plateau_growth": 0.2}, "budget.plateau_trials: 3 of 3 trials without growth"),
    ],
)
def test_the_limit_that_is_reached(budget: dict[str, float], told: str | None) -> None:
    limit = reached(limits(Budget.model_validate(budget), PRICE, USED))
    assert (str(limit) if limit else None) == told


def test_trials_end_a_study_when_all_have_ended() -> None:
    done = Usage(trials=12, planned_trials=12, wall_seconds=1, held={"l4": 1}, growth=[])
    found = limits(Budget(), PRICE, done)
    assert str(ended_by(found, [])) == "budget.trials: 12 of 12 trials"
    assert ended_by(found, [running(0)]) is None, "what runs is finished first"


def test_money_is_by_the_kind_that_was_held() -> None:
    held = {"a100": 36000.0, "l4": 3600.0}
    assert money(PRICE, held, 4 * 3600) == 54
    assert money(PRICE, {}, 4 * 3600) == 2, "nothing was held yet"
    assert money(PRICE.model_copy(update={"device": "l4"}), {**held, "h100": 3600}, 0) == 24, "whatever Ray calls it"
    with pytest.raises(InputError, match=r"no price for 'h100', .* prices are for l4, a100"):
        money(PRICE, {**held, "h100": 1.0}, 0)
    assert known_money(PRICE, {"h100": 1.0}, 0) is None


def test_device_hours_are_those_of_all_kinds() -> None:
    used = replace(USED, held={"l4": 18000, "a100": 18000})
    assert str(reached(limits(Budget(device_hours=9), PRICE, used))) == "budget.device_hours: 10 of 9 device-hours"


def test_kind_of_device() -> None:
    assert device_kind(PRICE, []) == "cpu"
    assert device_kind(PRICE, ["L4", "A100"]) == "a100", "of a mixed cluster the dearest: money is never undercounted"
    assert device_kind(PRICE.model_copy(update={"device": "mine"}), ["L4"]) == "mine"


def test_stagnation_counts_the_trials_that_brought_nothing() -> None:
    assert stagnation([], 0) == 0
    assert stagnation([0.2], 0) == 0
    assert stagnation([0.1, 0.2, 0.2], 0) == 1
    assert stagnation([0.1, 0.2, 0.2], 0.1) == 2


def test_remaining_time_is_that_of_the_nearest_limit() -> None:
    found = limits(Budget(device_hours=20), PRICE, USED)  # 3 of 12 trials in 2 h, 10 of 20 device-hours
    assert remaining_seconds(found, USED.wall_seconds) == pytest.approx(7200)
    assert remaining_seconds(limits(Budget(), PRICE, USED), USED.wall_seconds) == pytest.approx(3 * 7200)
    plateau = limits(Budget(plateau_trials=3), PRICE, USED)
    assert remaining_seconds(plateau, USED.wall_seconds) == pytest.approx(3 * 7200), "growth goes on as it likes"
    assert remaining_seconds([], 0) is None


def test_trials_beyond_a_smaller_budget_stay_planned() -> None:
    searched = [running(number) for number in range(3)]
    recipe = TrialRecord(3, "s-t00003-s0", "waiting", {}, "fare")
    assert [planned_trials(Budget(trials=trials), [*searched, recipe]) for trials in (2, 5)] == [4, 6]


def test_usage_counts_every_attempt(tmp_path: Path) -> None:
    config = study(tmp_path, trials=4)
    ledger = opened(config)
    run_next(ledger, config, complete(0.5, 0.1, device_seconds=100))
    run_next(ledger, config, Outcome(state="failed", reason="lost"), held=30)
    going = ledger.take()
    ledger.journal.log(going, Event(time=1, event="rung", metrics={"cost/device_seconds": 7}))
    growth, held = History(config.objectives, ledger.manifests()).shares, ledger.journal.held("l4")
    used = usage(config.budget, ledger.records(), ledger.manifests(), growth, held, wall_seconds=50)
    assert used.device_seconds == 137
    assert (used.trials, used.planned_trials) == (2, 6)
    assert len(used.growth) == 1
    assert opened(config).journal.held("l4") == held, "it is in the logs and accounts"


def test_money_without_prices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs price\.device_hour"):
        study(tmp_path, budget=Budget(money=5))
