"""The ledger: what exists decides what happens next."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa

from search_spaces.joint import JOINT
from study.config import Budget, Constraint, EarlyStopping, Objective, StudyConfig
from study.execution.tune_searcher import LedgerSearcher
from study.front.estimates import front
from study.front.hypervolume import hypervolume_history
from study.ledger import ledger as ledger_module
from study.ledger.ledger import Ledger
from study.ledger.remaining import Remaining, remaining
from study.ledger.trials import point_of, seed_of
from study.records import Event, State, TrialRecord, read_events, read_manifest
from tests.study.helpers import ended as last_report
from trainables.config import TrialConfig
from trainables.execution.worker import Patience
from trainables.results import Metric, Outcome, TrialResult

pytestmark = pytest.mark.usefixtures("database")


def record(number: int, state: State, recipe: str | None = None) -> TrialRecord:
    return TrialRecord(number, f"s-t{number:05d}-s0", state, {}, recipe)


@pytest.mark.parametrize(
    ("records", "manifests", "expected"),
    [
        ([], set(), Remaining([], [], 3)),
        ([record(0, "waiting", "mat")], set(), Remaining([], [], 3)),
        ([record(0, "running")], set(), Remaining([], [0], 2)),
        ([record(0, "running"), record(1, "running")], {"s-t00001-s0"}, Remaining([1], [0], 1)),
        (
            [record(i, state) for i, state in enumerate(["complete", "failed", "infeasible"])],
            set(),
            Remaining([], [], 0),
        ),
        ([record(i, "complete") for i in range(5)], set(), Remaining([], [], 0)),
        ([record(0, "complete", "mat"), record(1, "complete")], {"s-t00000-s0"}, Remaining([], [], 2)),
    ],
)
def test_remaining(records: list[TrialRecord], manifests: set[str], expected: Remaining) -> None:
    assert remaining(records, manifests, budget=3) == expected


def study(folder: Path, trials: int = 2) -> StudyConfig:
    return StudyConfig(
        name="s",
        studies_dir=folder,
        space=JOINT,
        recipes=("finetune", "fare"),
        objectives=(Objective(metric="clean/mr_r1"), Objective(metric="both/mr_r1")),
        budget=Budget(trials=trials),
        early_stopping=EarlyStopping(eta=3),
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
    assert point_of(config, taken[1]).trainable == "image"


def test_interrupted_trial_is_the_same_trial_again(tmp_path: Path) -> None:
    config = study(tmp_path)
    first = opened(config)
    for _ in range(2):
        first.finish(first.take(), complete(), TrialConfig())
    before = first.take()
    again = opened(config)
    assert again.remaining() == Remaining([], [2], 1)
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


@pytest.mark.parametrize("write", ["INTO trial_user_attr", "INTO trial_system_attr", "UPDATE trials"])
def test_stop_between_the_writes_of_an_end(tmp_path: Path, write: str) -> None:
    class Stopped(BaseException):
        pass

    def stop(connection: object, cursor: object, statement: str, *_: object) -> None:
        if write in statement:
            raise Stopped

    config = study(tmp_path)
    ledger = opened(config)
    taken = ledger.take()
    sa.event.listen(sa.Engine, "before_cursor_execute", stop)
    try:
        with pytest.raises(Stopped):
            ledger.finish(taken, Outcome(state="infeasible", reason="Diverged: nan"), TrialConfig())
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", stop)
    assert opened(config).records()[0].state == "infeasible"
    stored = optuna.load_study(study_name="s", storage=ledger_module.open_storage(config.paths, None)).trials[0]
    assert stored.state.name == "PRUNED"
    assert max(stored.constraints.values()) > 0


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
    assert ledger.remaining().fresh == 0
    assert opened(study(tmp_path, trials=4)).remaining().fresh == 3


def searched(ledger: Ledger) -> TrialRecord:
    while (record := ledger.take()).recipe is not None:
        ledger.finish(record, complete(), TrialConfig())
    return record


def rung(clean: float, both: float, seconds: float = 3.0) -> dict[str, float]:
    return {"clean/mr_r1": clean, "both/mr_r1": both, "cost/device_seconds": seconds}


def test_a_stopped_trial_keeps_its_rungs_and_cost_and_is_on_no_front(tmp_path: Path) -> None:
    config = study(tmp_path)
    ledger = opened(config)
    good, bad = searched(ledger), ledger.take()
    assert ledger.rung(good, 14, 1, rung(0.5, 0.1)) is None
    reason = ledger.rung(bad, 14, 1, rung(0.4, 0.05, 2.5))
    assert reason == "stopped at step 14: 1 of 1 trials were better there"
    manifest = ledger.stop(bad, reason, TrialConfig())
    assert (manifest.state, manifest.reason, manifest.metrics) == ("stopped", reason, {})
    assert manifest.rungs == {14: rung(0.4, 0.05, 2.5)}
    assert manifest.cost == {"device_seconds": 2.5, "steps": 14}
    assert read_manifest(config.paths.manifest(bad.key)) == manifest
    stored = optuna.load_study(study_name="s", storage=ledger_module.open_storage(config.paths, None)).trials[
        bad.number
    ]
    assert (stored.state.name, stored.values, stored.constraints) == ("PRUNED", None, {})
    assert stored.user_attrs["rungs"] == {"14": [0.4, 0.05]}
    assert opened(config).records()[bad.number].state == "stopped"
    assert bad.key not in {entry.key for entry in front(ledger.manifests(), config.objectives)}
    assert hypervolume_history(ledger.manifests(), config.objectives)[-1][2] == 2.5 + 2  # two recipes at 1 each


def test_rungs_between_the_levels_and_recipes_are_not_judged(tmp_path: Path) -> None:
    ledger = opened(study(tmp_path))
    recipe = ledger.take()
    first = searched(ledger)
    assert ledger.rung(first, 14, 1, rung(0.5, 0.5)) is None
    assert ledger.rung(first, 28, 2, rung(0.5, 0.5)) is None
    assert ledger.rung(recipe, 14, 1, rung(0.1, 0.1)) is None
    second = ledger.take()
    assert ledger.rung(second, 28, 2, rung(0.1, 0.1)) is None, "with eta 3, rungs are after epochs 1, 3, 9"
    assert ledger.rung(second, 14, 1, rung(0.4, 0.4)), "behind the first trial; the recipe counts, too"


def test_a_resumed_study_compares_with_all_rungs_and_keeps_its_verdicts(tmp_path: Path) -> None:
    config = study(tmp_path)
    ledger = opened(config)
    ended, going, stopped = searched(ledger), ledger.take(), ledger.take()
    verdicts = {}
    for time, (record, values) in enumerate([(ended, (0.5, 0.1)), (going, (0.1, 0.5)), (stopped, (0.4, 0.05))]):
        reason = ledger.rung(record, 14, 1, rung(*values))
        ledger.journal.log(record, Event(time=time, event="rung", step=14, metrics=rung(*values), message=reason or ""))
        verdicts[record.number] = reason
    ledger.finish(ended, complete(), TrialConfig())
    again = opened(config)
    assert again.remaining().resume == [going.number, stopped.number]
    assert [again.journal.verdict(record) for record in (going, stopped)] == [None, verdicts[stopped.number]]
    assert verdicts[stopped.number] == "stopped at step 14: 2 of 2 trials were better there"
    for session in (ledger, again):  # the sampler sees what those that run measured
        trials = session._study.get_trials(deepcopy=False)
        assert trials[going.number].user_attrs["rungs"] == {"14": [0.1, 0.5]}
    late = again.take()
    assert again.rung(late, 14, 1, rung(0.3, 0.01)) == "stopped at step 14: 3 of 3 trials were better there"


def test_the_whole_evaluation_is_logged_and_is_no_rung(tmp_path: Path) -> None:
    config = study(tmp_path).model_copy(update={"recipes": ()})
    searcher = LedgerSearcher(
        opened(config), lambda record: TrialConfig(key=record.key), Patience(), lambda: True, lambda *_: None
    )
    searcher.suggest("only")
    report = {"epoch": 1, "resumed_from_step": -1, "history": "[]", **rung(0.5, 0.1)}
    for step, last in ((7, False), (14, True)):
        searcher.rung("only", {**report, "step": step, "last": last})
    events = list(read_events(config.paths.events("s-t00000-s0")))
    told = [(event.event, event.step) for event in events]
    assert told == [("start", 0), ("attempt", 0), ("rung", 7), ("final", 14)]
    assert events[0].message.startswith("w=1 tau=0.05 learn=no eps=0/255"), "what is searched, and no constants"
    assert "companion" not in events[0].message
    again = opened(config)  # killed before the trial was accounted for
    assert again.journal.rungs.of("s-t00000-s0").keys() == {7}


def test_a_trial_that_breaks_a_constraint_is_infeasible_with_its_values(tmp_path: Path) -> None:
    bound = Constraint(metric="clean/mr_r1", at_least=0.6)
    config = study(tmp_path).model_copy(update={"constraints": (bound,)})
    ledger = opened(config)
    poor = ledger.finish(ledger.take(), complete(0.5, 0.3), TrialConfig())
    ledger.finish(ledger.take(), complete(0.6, 0.2), TrialConfig())
    assert (poor.state, poor.reason) == ("infeasible", "does not keep clean/mr_r1 >= 0.6")
    assert [r.state for r in ledger.records()] == ["infeasible", "complete"]
    assert [entry.key for entry in front(ledger.manifests(), config.objectives)] == ["s-t00001-s0"]
    stored = optuna.load_study(study_name="s", storage=ledger_module.open_storage(config.paths, None)).trials
    assert [(t.state.name, t.values) for t in stored] == [("COMPLETE", [0.5, 0.3]), ("COMPLETE", [0.6, 0.2])]
    assert [t.constraints for t in stored] == [{"clean/mr_r1 >= 0.6": pytest.approx(0.1)}, {"clean/mr_r1 >= 0.6": 0.0}]


def test_memory_is_a_cost_that_can_be_bounded(tmp_path: Path) -> None:
    bound = Constraint(metric="cost/peak_memory_gb", at_most=20)
    config = study(tmp_path).model_copy(update={"constraints": (bound,), "recipes": ()})
    ledger = opened(config)
    searcher = LedgerSearcher(
        ledger, lambda record: TrialConfig(key=record.key), Patience(), lambda: True, lambda *_: None
    )
    report = {"step": 7, "epoch": 1, "last": False, "resumed_from_step": -1, "history": "[]", "device_seconds": 2.0}
    for trial, held in (("small", 19.0), ("large", 21.0)):
        assert isinstance(searcher.suggest(trial), dict)
        values = {"clean/mr_r1": 0.5, "both/mr_r1": 0.1 + held / 100}
        goes_on = searcher.rung(trial, {**report, **values, "peak_memory_gb": held})
        assert goes_on == (trial == "small"), "beyond the bound it is behind, though it is the more robust"
    searcher.on_trial_complete("large")
    small = complete(0.5, 0.1)
    assert small.result is not None
    grown = small.model_copy(update={"result": small.result.model_copy(update={"peak_memory_gb": 22.0})})
    searcher.on_trial_complete("small", last_report(grown))
    stopped, broken = ledger.manifests()
    assert (stopped.cost["peak_memory_gb"], stopped.cost["steps"]) == (21.0, 7)
    assert (broken.state, broken.reason) == ("infeasible", "does not keep cost/peak_memory_gb <= 20")
    assert broken.cost["peak_memory_gb"] == 22
    stored = optuna.load_study(study_name="s", storage=ledger_module.open_storage(config.paths, None)).trials
    assert stored[0].constraints == {"cost/peak_memory_gb <= 20": 2.0}
    with pytest.raises(ValueError, match="metrics are cost/device_seconds, cost/peak_memory_gb and TARGET"):
        StudyConfig(constraints=(Constraint(metric="memory", at_most=20),))


def test_the_log_tells_every_checkpoint_a_trial_went_on_from(tmp_path: Path) -> None:
    config = study(tmp_path).model_copy(update={"recipes": ()})
    searcher = LedgerSearcher(
        opened(config), lambda record: TrialConfig(key=record.key), Patience(), lambda: True, lambda *_: None
    )
    assert isinstance(searcher.suggest("only"), dict)
    for step, resumed in ((8, -1), (16, -1), (16, 8), (24, 8), (32, 24)):  # a worker was lost twice
        report = {"step": step, "epoch": 1, "last": False, "resumed_from_step": resumed, "history": "[]"}
        searcher.rung("only", {**report, "device_seconds": 2.0})
    events = read_events(config.paths.events("s-t00000-s0"))
    told = [(event.event, event.step) for event in events if event.event in ("resume", "rung")]
    assert told == [("rung", 8), ("rung", 16), ("resume", 8), ("rung", 24), ("resume", 24), ("rung", 32)]


def test_database_and_memory_say_the_same(tmp_path: Path) -> None:
    config = study(tmp_path, trials=6)
    ledger = opened(config)
    record = searched(ledger)
    ledger.rung(record, 14, 1, rung(0.5, 0.1))
    ledger.stop(record, "why", TrialConfig())
    ledger.finish(ledger.take(), Outcome(state="infeasible", reason="Diverged: nan"), TrialConfig())
    ledger.finish(ledger.take(), complete(0.3, 0.3), TrialConfig())
    ledger.take()
    in_memory = ledger._study.get_trials()
    stored = optuna.load_study(study_name="s", storage=ledger_module.open_storage(config.paths, None)).get_trials()
    for one, other in zip(in_memory, stored, strict=True):
        for name in ("number", "state", "values", "params", "distributions", "user_attrs", "constraints"):
            assert getattr(one, name) == getattr(other, name), name
    assert [t.state.name for t in stored] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED", "COMPLETE", "RUNNING"]


def test_replicates_come_last_with_fresh_seeds_and_are_never_stopped(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2).model_copy(update={"replicates": 2})
    ledger = opened(config)
    for clean, both in ((0.9, 0.1), (0.1, 0.05), (0.5, 0.5)):
        record = ledger.take_next()
        assert record is not None
        ledger.finish(record, complete(clean, both), TrialConfig())
    last = ledger.take_next()
    assert last is not None
    assert ledger.take_next() is None
    assert ledger.left() == 0, "which are near the front depends on the one that runs"
    ledger.finish(last, complete(0.2, 0.2), TrialConfig())
    assert opened(config).records() == ledger.records()
    assert ledger.left() == 4
    again = list(iter(ledger.take_next, None))
    assert [record.key for record in again] == ["s-t00000-s1", "s-t00000-s2", "s-t00002-s1", "s-t00002-s2"]
    assert [record.recipe for record in again] == ["finetune", "finetune", None, None]
    assert again[2].params == ledger.records()[2].params
    assert len({seed_of(config, record) for record in [*again[:2], last]}) == 3
    assert ledger.rung(last, 14, 1, rung(0.9, 0.9)) is None
    assert ledger.rung(again[2], 14, 1, rung(0.0, 0.0)) is None
    for record in again:
        manifest = ledger.finish(record, complete(0.8, 0.4), TrialConfig())
        assert manifest.replicate == record.replicate
    assert ledger.remaining() == Remaining([], [], 0)
    assert ledger.take_next() is None
    assert ledger.left() == 0
    assert {entry.key: entry.replicates for entry in front(ledger.manifests(), config.objectives)} == {
        "s-t00000-s0": 3,
        "s-t00002-s0": 3,
    }
