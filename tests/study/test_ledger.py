"""The ledger: what exists decides what happens next."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from search_spaces.joint import JOINT
from study import ledger as ledger_module
from study.config import Budget, Objective, StudyConfig
from study.ledger import Ledger, Plan, plan
from study.records import TrialRecord, read_manifest
from trainables.config import Metric, TrialConfig, TrialResult
from trainables.trial import Outcome

pytestmark = pytest.mark.usefixtures("database")


def record(number: int, state: str, recipe: str | None = None) -> TrialRecord:
    return TrialRecord(number, f"s-t{number:05d}-s0", state, {}, recipe)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("records", "manifests", "expected"),
    [
        ([], set(), Plan([], [], 3)),
        ([record(0, "waiting", "mat")], set(), Plan([], [], 3)),
        ([record(0, "running")], set(), Plan([], [0], 2)),
        ([record(0, "running"), record(1, "running")], {"s-t00001-s0"}, Plan([1], [0], 1)),
        ([record(i, state) for i, state in enumerate(["complete", "failed", "infeasible"])], set(), Plan([], [], 0)),
        ([record(i, "complete") for i in range(5)], set(), Plan([], [], 0)),
        ([record(0, "complete", "mat"), record(1, "complete")], {"s-t00000-s0"}, Plan([], [], 2)),
    ],
)
def test_plan(records: list[TrialRecord], manifests: set[str], expected: Plan) -> None:
    assert plan(records, manifests, budget=3) == expected


def study(folder: Path, trials: int = 2) -> StudyConfig:
    return StudyConfig(
        name="s",
        studies_dir=folder,
        space=JOINT,
        recipes=("finetune", "fare"),
        objectives=(Objective(metric="clean/mr_r1"), Objective(metric="both/mr_r1")),
        budget=Budget(trials=trials),
    )


def opened(config: StudyConfig) -> Ledger:
    config.paths.root.mkdir(parents=True, exist_ok=True)
    return Ledger(config, config.paths, "print")


def complete(clean: float = 0.5, both: float = 0.1) -> Outcome:
    values = {"clean/mr_r1": clean, "both/mr_r1": both}
    return Outcome(
        state="complete",
        result=TrialResult(
            metrics={name: Metric(value=value, low=value, high=value) for name, value in values.items()},
            correct={},
            queries={},
            device_seconds=1,
            seconds={},
            steps=1,
            resumed_from_steps=[],
            temperature=0.1,
            hashes={},
            versions={},
        ),
    )


def test_recipes_come_once_and_first_and_fare_tells_the_sampler_nothing(tmp_path: Path) -> None:
    config = study(tmp_path)
    for _ in range(3):
        ledger = opened(config)
    assert [r.recipe for r in ledger.records()] == ["finetune", "fare"]
    taken = [ledger.take() for _ in range(3)]
    assert [r.recipe for r in taken] == ["finetune", "fare", None]
    assert taken[0].params["epsilon"] == 0
    assert "attack_steps" not in taken[0].params
    assert taken[1].params == {}
    assert ledger.point(taken[1]).trainable == "image"


def test_interrupted_trial_is_the_same_trial_again(tmp_path: Path) -> None:
    config = study(tmp_path)
    first = opened(config)
    for _ in range(2):
        first.finish(first.take(), complete(), TrialConfig())
    before = first.take()
    again = opened(config)
    assert again.plan() == Plan([], [2], 1)
    assert again.take(2) == before
    assert again.take().params != before.params


def test_stop_between_manifest_and_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(tmp_path)
    ledger = opened(config)
    taken = ledger.take()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_tell", lambda self, manifest: None)
        ledger.finish(taken, complete(0.7, 0.2), TrialConfig())
    assert ledger.records()[0].state == "running"
    assert opened(config).records()[0].state == "complete"
    stored = optuna.load_study(study_name="s", storage=ledger_module.open_storage(config.paths, None))
    assert stored.trials[0].values == [0.7, 0.2]


def test_finishing_twice_is_finishing_once(tmp_path: Path) -> None:
    config = study(tmp_path)
    ledger = opened(config)
    taken = ledger.take()
    ledger.finish(taken, complete(0.7, 0.2), TrialConfig())
    ledger.finish(taken, complete(0.1, 0.1), TrialConfig())
    manifest = read_manifest(config.paths.manifest(taken.key))
    assert manifest is not None
    assert manifest.metrics["clean/mr_r1"].value == 0.7
    assert [r.state for r in ledger.records()] == ["complete", "waiting"]


def test_infeasible_and_failed_are_told_apart(tmp_path: Path) -> None:
    config = study(tmp_path)
    ledger = opened(config)
    ledger.finish(ledger.take(), Outcome(state="infeasible", reason="Diverged: nan"), TrialConfig())
    ledger.finish(ledger.take(), Outcome(state="failed", reason="lost"), TrialConfig())
    assert [r.state for r in ledger.records()] == ["infeasible", "failed"]
    stored = optuna.load_study(study_name="s", storage=ledger_module.open_storage(config.paths, None)).trials
    assert [t.state.name for t in stored] == ["PRUNED", "FAIL"]
    assert [t.user_attrs["reason"] for t in stored] == ["Diverged: nan", "lost"]
    assert max(stored[0].constraints.values()) > 0


def test_larger_budget_extends(tmp_path: Path) -> None:
    ledger = opened(study(tmp_path, trials=1))
    for _ in range(3):
        ledger.finish(ledger.take(), complete(), TrialConfig())
    assert ledger.plan().fresh == 0
    assert opened(study(tmp_path, trials=4)).plan().fresh == 3
