"""Every sampler does its work; warm starts and given points reach it, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from search_spaces.joint import JOINT
from study.config import Budget, EarlyStopping, Objective, SamplerName, StudyConfig
from study.execution.simulator import Clock, Surrogate, simulate
from study.front.hypervolume import hypervolume_history
from study.ledger.frozen import fingerprint, freeze
from study.ledger.ledger import Ledger
from study.ledger.store import HISTORY, MirroredStorage
from study.search.gp_sampler import read_trials
from study.search.samplers import RepeatableSampler, reason
from study.search.unit_box import UnitBox
from trainables.config import Protocol, TrainingConfig, TrialConfig, content_hash
from trainables.errors import InputError


def config(folder: Path = Path("unused"), **changes: Any) -> StudyConfig:
    settings: dict[str, Any] = {
        "name": "s",
        "studies_dir": folder,
        "recipes": (),
        "objectives": (Objective(metric="clean/mr_r5"), Objective(metric="both/mr_r5")),
        "budget": Budget(trials=14),
    }
    return StudyConfig(**{**settings, **changes})


def opened(settings: StudyConfig, mark: dict[str, Any] | None = None) -> Ledger:
    settings.paths.root.mkdir(parents=True, exist_ok=True)
    freeze(settings, mark or fingerprint(settings, "data", "code"), accept_changes=False)
    return Ledger(settings, settings.paths, "print")


def run(settings: StudyConfig, ledger: Ledger | None = None, slots: int = 2, **changes: float) -> Ledger:
    clock = Clock()
    ledger = ledger or Ledger(settings, None, "print", clock)
    surrogate = Surrogate(lost_rate=0, out_of_memory_rate=0, seed=1).model_copy(update=changes)
    list(simulate(ledger, TrialConfig(training=TrainingConfig(epochs=3)), surrogate.course, slots, clock))
    return ledger


@pytest.mark.parametrize("sampler", [name for name in get_args(SamplerName) if name != "auto"])
def test_every_sampler_proposes_points_of_the_space_and_does_not_repeat_itself(sampler: SamplerName) -> None:
    stopping = EarlyStopping(enabled=sampler not in ("nsga2", "nsga3"))
    ledger = run(config(sampler=sampler, early_stopping=stopping))
    records = ledger.records()
    assert len(records) == 14
    assert len({str(record.params) for record in records}) == 14
    for record in records:
        assert all(JOINT[name].contains(value) for name, value in record.params.items())
    again = run(config(sampler=sampler, early_stopping=stopping))
    assert [record.params for record in again.records()] == [record.params for record in records]


@pytest.mark.parametrize("sampler", ["gp", "qmc", "random", "tpe"])
def test_a_resumed_study_does_not_draw_again_what_it_drew_first(tmp_path: Path, sampler: SamplerName) -> None:
    settings = config(tmp_path, sampler=sampler)
    first = [opened(settings).take().params for _ in range(4)]
    assert len({str(params) for params in first}) == 4


def test_auto_says_what_it_chose_and_why() -> None:
    few, many = (reason(config(sampler="auto", budget=Budget(trials=trials))) for trials in (300, 301))
    assert few == "sampler auto: gp, because there are no more than 300 trials"
    assert many.startswith("sampler auto: gp for 300 trials and tpe for the rest, where")
    assert reason(config(sampler="tpe")) == reason(config(sampler="gp")) == ""


def test_auto_is_gp_first_and_tpe_after_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.search.samplers.GP_TRIALS", 10)
    gp, both = ([record.params for record in run(config(sampler=sampler)).records()] for sampler in ("gp", "auto"))
    assert both[:10] == gp[:10]
    assert both[10] != gp[10]
    drawn: list[int] = []
    original = RepeatableSampler.sample_independent

    def counted(self: RepeatableSampler, study: optuna.Study, trial: FrozenTrial, name: str, how: Any) -> Any:
        drawn.append(trial.number)
        return original(self, study, trial, name, how)

    monkeypatch.setattr(RepeatableSampler, "sample_independent", counted)
    run(config(sampler="auto"))
    assert set(drawn) == {10, 11, 12, 13}


def test_gp_begins_spread_over_every_knob() -> None:
    ledger = Ledger(config(sampler="gp"), None, "print")
    taken = UnitBox(JOINT).units([ledger.take().params for _ in range(16)])
    for knob in ("contrastive_weight", "temperature", "epsilon"):
        first, second = taken[:8, list(JOINT).index(knob)], taken[8:, list(JOINT).index(knob)]
        assert sorted(np.floor(8 * first)) == sorted(np.floor(8 * second)) == list(range(8))
        assert (first != second).all()


def test_gp_finds_more_than_chance_and_learns_from_the_stopped() -> None:
    def share(sampler: SamplerName) -> float:
        ledger = run(config(sampler=sampler, budget=Budget(trials=40)))
        states = [record.state for record in ledger.records()]
        known = read_trials(ledger._study.get_trials(), UnitBox(JOINT), ledger._config.objectives)
        assert len(known.points) == 40 - states.count("infeasible")
        assert known.usable.sum() == states.count("complete") < 40
        return hypervolume_history(ledger.manifests(), ledger._config.objectives)[-1][3]

    assert share("gp") > share("random") + 0.05


@pytest.mark.parametrize("sampler", ["auto", "tpe"])
def test_how_long_trials_take_changes_nothing(sampler: SamplerName) -> None:
    """So that one whose worker was lost, and which took twice as long, does not change the study."""
    studies = [
        [record.params for record in run(config(sampler=sampler), slots=1, **seconds).records()]
        for seconds in ({}, {"step_seconds": 3.0, "start_seconds": 0.1})
    ]
    assert studies[0] == studies[1]


def test_gp_is_not_led_astray_by_recipes_that_differ_in_few_knobs() -> None:
    """Such recipes tell nothing of the other knobs; a process that takes this for no effect stays near them."""

    def share(sampler: SamplerName, seed: int) -> float:
        settings = config(sampler=sampler, seed=seed, budget=Budget(trials=12))
        ledger = run(settings.model_copy(update={"recipes": ("finetune", "tecoa_itr", "fare", "mat")}))
        return hypervolume_history(ledger.manifests(), settings.objectives)[-1][3]

    seeds = range(6)
    assert np.mean([share("gp", seed) - share("random", seed) for seed in seeds]) > 0.03


@pytest.mark.parametrize("objectives", [1, 2])
def test_tpe_proposes_what_optunas_does(objectives: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(sampler="tpe")
    settings = settings.model_copy(update={"objectives": settings.objectives[:objectives]})
    ledger = run(settings)
    asked = []
    original = RepeatableSampler.sample_independent

    def compared(
        self: RepeatableSampler, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        seed = int(content_hash({"seed": settings.seed, "trial": trial.number, "parameter": name})[:8], 16)
        stock = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
        asked.append((stock.sample_independent(study, trial, name, distribution), name))
        drawn = original(self, study, trial, name, distribution)
        assert asked[-1] == (drawn, name)
        return drawn

    monkeypatch.setattr(RepeatableSampler, "sample_independent", compared)
    for running in range(3):  # those that run count, too
        ledger.take()
        assert len(asked) > 4 * running
    assert len({value for value, name in asked if name == "temperature"}) == 3


def test_given_points_come_once_after_the_recipes_and_count_as_searched(tmp_path: Path) -> None:
    points = ({"contrastive_weight": 0.5, "epsilon": "2/255", "attack_steps": 2}, {"temperature": 0.1})
    settings = config(tmp_path, recipes=("mat",), points=points)
    for _ in range(2):
        ledger = opened(settings)
    assert [record.state for record in ledger.records()] == ["waiting"] * 3
    assert ledger.remaining().fresh == 12
    recipe, first, second = (ledger.take() for _ in range(3))
    assert (recipe.recipe, first.recipe, second.recipe) == ("mat", None, None)
    assert [first.params[name] for name in points[0]] == [0.5, 2 / 255, 2]
    assert second.params["temperature"] == 0.1
    with pytest.raises(ValueError, match=r"words=7 is not in the space; heads is not in the space"):
        config(points=({"words": 7}, {"heads": 2}))


def test_a_warm_start_teaches_the_sampler_and_enters_nothing_else(tmp_path: Path) -> None:
    first = config(tmp_path)
    mark = fingerprint(first, "data", "code")
    run(first, opened(first, mark))
    second = config(tmp_path, name="second", seed=3, warm_start=("s",), early_stopping=EarlyStopping(enabled=False))
    ledger = opened(second, {**mark, "seed": 3})
    assert ledger.records() == ledger.manifests() == []
    assert ledger.remaining().fresh == 14
    seen = ledger._study.get_trials()
    assert [trial.number for trial in seen] == list(range(-14, 0))
    assert {trial.state.name for trial in seen} == {"COMPLETE", "PRUNED"}
    taken = ledger.take()
    assert taken.key == "second-t00000-s0"
    run(second, ledger)
    assert len(opened(second, {**mark, "seed": 3}).records()) == 14
    other = config(tmp_path, name="third", warm_start=("s",), protocol=Protocol(words=2))
    with pytest.raises(InputError, match=r"(?s)cannot be compared.*protocol.words: 1 -> 2"):
        opened(other)
    with pytest.raises(InputError, match="there is no study 'none'"):
        opened(config(tmp_path, name="fourth", warm_start=("none",)))


def test_a_sampler_sees_what_runs_and_the_last_that_ended() -> None:
    import optuna

    storage = MirroredStorage(None, "s", [optuna.study.StudyDirection.MINIMIZE])
    study = optuna.load_study(study_name="s", storage=storage, sampler=optuna.samplers.RandomSampler())
    study.ask()
    for number in range(HISTORY + 5):
        study.tell(study.ask(), number)
    assert [trial.number for trial in study.get_trials(deepcopy=False)] == [0, *range(6, HISTORY + 6)]
    assert len(storage.whole()) == HISTORY + 6
