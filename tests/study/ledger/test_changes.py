"""`--accept-changes`: what can be carried over is, whatever the change; what cannot is refused before anything is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest

from search_spaces.joint import JOINT
from search_spaces.space import Knob, check_space, is_inside
from study.config import Budget, Constraint, Objective, StudyConfig
from study.ledger.ledger import Ledger, read_records
from study.ledger.ownership import claim
from study.ledger.rows import OUTSIDE
from study.ledger.store import open_storage
from study.ledger.trials import point_of
from study.records import read_frozen, read_manifest
from study.search.unit_box import UnitBox
from tests.study.helpers import complete, study
from trainables.config import TrialConfig
from trainables.errors import InputError
from trainables.results import Metric, Outcome

SAMPLERS = ("auto", "tpe", "random", "qmc", "nsga2")
METRICS = ("clean/mr_r1", "both/mr_r1", "image/mr_r1")


def opened(config: StudyConfig, accept: bool = False) -> Ledger:
    config.paths.root.mkdir(parents=True, exist_ok=True)
    storage = open_storage(config.paths, config.storage)
    mark = {name: config.model_dump(mode="json")[name] for name in ("space", "objectives", "constraints", "recipes")}
    return Ledger(config, config.paths, claim(config, storage, mark, accept), database=storage)


def measured(draw: random.Random) -> Outcome:
    outcome = complete(draw.random(), draw.random())
    assert outcome.result is not None
    third = draw.random()
    metrics = {**outcome.result.metrics, "image/mr_r1": Metric(value=third, low=third, high=third)}
    return outcome.model_copy(update={"result": outcome.result.model_copy(update={"metrics": metrics})})


def lived(folder: Path, draw: random.Random, **fields: Any) -> StudyConfig:
    config = study(folder, budget=Budget(trials=8), **fields)
    ledger = opened(config)
    for _ in range(draw.randint(4, 9)):
        record = ledger.take_next()
        assert record is not None
        match draw.choice(["complete", "complete", "infeasible", "stopped", "running"]):
            case "complete":
                ledger.finish(record, measured(draw), TrialConfig(key=record.key))
            case "infeasible":
                ledger.finish(record, Outcome(state="infeasible", reason="nan"), TrialConfig(key=record.key))
            case "stopped":
                ledger.stop(record, "is behind", TrialConfig(key=record.key))
    return config


def another_knob(name: str, knob: Knob, draw: random.Random) -> Knob:
    """Wider, narrower, with other choices, of another kind: whatever is drawn."""
    if knob.choices is not None:
        more = {"temperature_learned": [True, False], "attack_steps": [1, 2, 3, 4], "words": [0, 1, 2, 3]}[name]
        return knob.model_copy(update={"choices": tuple(draw.sample(more, draw.randint(1, len(more))))})
    low, high = float(knob.low or 0), float(knob.high or 0)
    ends = {"contrastive_weight": (0.0, 1.0), "temperature": (0.005, 0.5), "epsilon": (0.0, 16 / 255)}[name]
    values = sorted(draw.choice([low, high, *ends, draw.uniform(*ends)]) for _ in range(2))
    return knob.model_copy(update={"low": values[0], "high": values[1], "log": values[0] > 0 and draw.random() < 0.5})


def another_space(draw: random.Random) -> dict[str, Knob]:
    while True:
        space = {
            name: another_knob(name, knob, draw) if draw.random() < 0.5 else knob
            for name, knob in JOINT.items()
            if draw.random() < 0.85
        }
        if space and not check_space(space):
            return space


@pytest.mark.parametrize("seed", range(5))
def test_any_change_of_the_space_is_carried_over(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    config = lived(tmp_path, draw, sampler=SAMPLERS[seed % 5], seed=seed)
    before = opened(config).records()
    for _ in range(2):
        changed = config.model_copy(update={"space": another_space(draw), "budget": Budget(trials=12)})
        if changed.space == config.space:
            continue
        with pytest.raises(InputError, match="begun with other settings"):
            opened(changed)
        ledger = opened(changed, accept=True)
        assert ledger.records() == before
        for trial in ledger._storage.whole():
            params = before[trial.number].params
            assert (OUTSIDE in trial.user_attrs) == (bool(params) and not is_inside(changed.space, params))
            assert trial.distributions == {name: UnitBox(changed.space).distributions[name] for name in trial.params}
        for number in ledger.remaining().resume:
            assert ledger.take(number) == before[number], "an interrupted trial is the trial that it was"
        while (record := ledger.take_next()) is not None:
            if record.searched:
                assert is_inside(changed.space, record.params)
            point_of(changed, record)
            ledger.finish(record, measured(draw), TrialConfig(key=record.key))
        config, before = changed, opened(changed).records()
        assert read_records("s", open_storage(config.paths, None)) == before


@pytest.mark.parametrize("seed", range(3))
def test_objectives_come_from_the_accounts(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    config = lived(tmp_path, draw, sampler=SAMPLERS[seed % 5])
    before = opened(config).records()
    for _ in range(2):
        metrics = draw.sample(METRICS, draw.randint(1, 3))
        objectives = tuple(Objective(metric=m, direction=draw.choice(["maximize", "minimize"])) for m in metrics)
        config = config.model_copy(update={"objectives": objectives})
        ledger = opened(config, accept=True)
        assert ledger.records() == before
        stored = optuna.load_study(study_name="s", storage=open_storage(config.paths, None))
        assert [d.name.lower() for d in stored.directions] == [objective.direction for objective in objectives]
        for record, trial in zip(before, stored.trials, strict=True):
            manifest = read_manifest(config.paths.manifest(record.key))
            if manifest is not None and manifest.metrics:
                assert trial.values == [manifest.metrics[metric].value for metric in metrics]
        assert ledger.take().params is not None
        before = opened(config).records()


def changed(config: StudyConfig, **fields: Any) -> StudyConfig:
    return config.model_copy(update=fields)


def test_what_was_never_measured_is_refused_at_once(tmp_path: Path) -> None:
    config = study(tmp_path, trials=3)
    ledger = opened(config)
    draw = random.Random(0)
    for _ in range(3):
        record = ledger.take()
        ledger.finish(record, measured(draw), TrialConfig(key=record.key))
    files = {path: path.read_bytes() for path in (config.paths.config, config.paths.database)}
    text = (*config.objectives, Objective(metric="text/mr_r1"))
    never = Constraint(metric="text/mr_r1", at_least=0.1)
    broken = Constraint(metric="clean/mr_r1", at_least=1.0)
    for fields, told in (
        (
            {"objectives": text},
            "text/mr_r1 was never measured in 3 of 3 trials, such as s-t00000-s0; all have",
        ),
        ({"constraints": (never,)}, "constraints: s-t00000-s0 ended complete, and does not keep text/mr_r1 >= 0.1"),
        ({"constraints": (broken,)}, "constraints: s-t00002-s0 ended complete, and does not keep clean/mr_r1 >= 1"),
    ):
        with pytest.raises(InputError, match=told):
            opened(changed(config, **fields), accept=True)
        assert {path: path.read_bytes() for path in files} == files
    kept = Constraint(metric="clean/mr_r1", at_least=0.0)
    ledger = opened(changed(config, constraints=(kept,)), accept=True)
    assert [list(trial.constraints) for trial in ledger._storage.whole()[:3]] == [[str(kept)]] * 3


def test_a_stop_between_accepting_and_carrying_over_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lived(tmp_path, random.Random(1))
    before = opened(config).records()
    wide = {**JOINT, "words": JOINT["words"].model_copy(update={"choices": (0, 1, 2, 3)})}
    wider = changed(config, space=wide)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("study.ledger.ownership.make_room", stopped)
        with pytest.raises(KeyboardInterrupt):
            opened(wider, accept=True)
    assert len(read_frozen(config.paths).accepted) == 1
    ledger = opened(wider)
    assert ledger.records() == before
    distributions = [trial.distributions["words"] for trial in ledger._storage.whole() if "words" in trial.params]
    assert distributions == [optuna.distributions.CategoricalDistribution((0, 1, 2, 3))] * len(distributions) != []
