"""A session's own bookkeeping, without Ray and MLflow: when it writes the front, and what it tidies up."""

from __future__ import annotations

import logging
import shutil
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dashboards import pareto_page
from study.config import Budget, ClusterConfig, Price, TrialTemplate
from study.execution import session as session_module
from study.execution.cluster import Growth
from study.execution.session import DONE, FAILED, Session, told_by_tune_alone
from study.ledger.ledger import Ledger
from study.records import Event
from study.tracking.background import Background
from tests.study.helpers import complete, opened, run_next, study
from trainables.config import TrialConfig, WorkersConfig
from trainables.errors import InputError
from trainables.execution.checkpoints import seal
from trainables.execution.signals import RESUMABLE
from trainables.identity import made_from
from trainables.results import Attempt, Outcome


class NoTracking:
    """Stands for the MLflow projection."""

    def __init__(self, *_: Any) -> None: ...

    def sync(self, *_: Any) -> None: ...


class AtOnce(Background[Any]):
    """What is asked for is done before the caller goes on."""

    def request(self, asked: Any) -> None:
        self._do(asked)


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "Projection", NoTracking)
    monkeypatch.setattr(session_module, "Background", AtOnce)


def session_of(config: Any, ledger: Ledger, template: TrialConfig | None = None) -> Session:
    lease: Any = SimpleNamespace(last_device=None, worked_seconds=lambda: 1.0)
    return Session(config, ledger, template or TrialConfig(), lease)


def test_the_front_is_written_when_it_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(tmp_path, trials=4, recipes=())
    ledger = opened(config)
    session = session_of(config, ledger)
    writes = []
    original = pareto_page.write_front_files
    monkeypatch.setattr(
        pareto_page, "write_front_files", lambda *given: (writes.append(len(given[1])), original(*given))[1]
    )
    diverged = Outcome(state="infeasible", reason="Diverged: nan")
    for outcome in (complete(0.5, 0.5), complete(0.2, 0.2), diverged, complete(0.6, 0.1)):
        manifest = run_next(ledger, config, outcome)
        session._changed(ledger.records()[manifest.number], manifest)
    assert writes == [1, 4], "only the first and the last of four moved it"
    written = config.paths.front.read_text()
    original(config.paths, ledger.manifests(), config.objectives, "x", config.protocol)
    assert config.paths.front.read_text() == written


def test_checkpoints_of_stopped_trials_go_and_others_stay(tmp_path: Path) -> None:
    config = study(tmp_path, trials=3, recipes=())
    ledger = opened(config)
    session = session_of(config, ledger)
    records = [ledger.take() for _ in range(3)]
    checkpoints = [config.paths.runs / record.key / "checkpoint_1" / "state.json" for record in records]
    for checkpoint in checkpoints:
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text("{}")
    session._changed(records[0], ledger.finish(records[0], complete(), TrialConfig()))
    session._changed(records[1], ledger.stop(records[1], "why", TrialConfig()))
    assert [path.exists() for path in checkpoints] == [True, False, True]
    ledger.stop(records[2], "killed before it tidied up", TrialConfig())
    session_of(config, ledger)
    assert [path.exists() for path in checkpoints] == [True, False, False]


class Cursor:
    """Of a query that is cut short: as long as it lives, SQLite lets nobody write."""


cut_short: list[weakref.ref[Cursor]] = []


def interrupted(self: Session, stack: object) -> tuple[float, float]:
    cursor = Cursor()
    cut_short.append(weakref.ref(cursor))
    raise KeyboardInterrupt


def test_a_resumed_session_begins_with_the_front_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = study(tmp_path, trials=3, recipes=())
    ledger = opened(config)
    for outcome in (complete(0.5, 0.2), complete(0.2, 0.5)):
        run_next(ledger, config, outcome)
    session = session_of(config, opened(config))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(Session, "_connect", interrupted)
    try:
        session.explore(1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert cut_short[-1]() is None
    shown = capsys.readouterr().out
    assert "front: 2 points, hypervolume" in shown
    assert "2 on the front" in "".join(str(part) for part in session._display._table().renderables)


def test_a_session_that_moves_nothing_does_not_ask_to_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = study(tmp_path, trials=2, recipes=())
    ledger = opened(config)
    run_next(ledger, config, complete())
    session = session_of(config, ledger)
    session._lease.worked_seconds = lambda: 0.0
    session._device = "cpu"
    assert session.close() == FAILED
    assert "nothing could be done for what is left: 1 trial\n" in capsys.readouterr().out
    session._stopped_with = RESUMABLE
    assert session.close() == RESUMABLE
    assert f"to go on: python -m study.run --name s --studies-dir {tmp_path}" in capsys.readouterr().out
    session._stopped_with = None
    going = ledger.take()
    session._changed(going, Event(time=1, event="rung", step=1))
    assert session.close() == RESUMABLE, "it came further"


@pytest.mark.parametrize("robust", [(0.1, 0.2), (0.1, 0.1)])
def test_done_does_not_stand_over_a_result_that_means_nothing(
    robust: tuple[float, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = study(tmp_path, trials=2, recipes=())
    ledger = opened(config)
    for value in robust:
        run_next(ledger, config, complete(1 - 5 * value, value))
    code = session_of(config, ledger).close()
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    if robust[0] != robust[1]:
        assert (code, warnings) == (DONE, [])
    else:
        assert code == FAILED
        (told,) = warnings
        assert (
            "all 2 complete trials are equal in every objective, so nothing can be concluded: clean/mr_r1 0.500" in told
        )
    assert any(line.startswith("study s is done: 2 trials") for line in lines[-2:])


def test_checkpoints_that_belong_to_other_trials_are_told_before_ray_starts(tmp_path: Path) -> None:
    config = study(tmp_path, trials=3, recipes=())
    ledger = opened(config)
    taken = [ledger.take() for _ in range(3)]
    template = TrialConfig(storage_path=str(config.paths.runs))
    session = session_of(config, opened(config), template)
    for record in taken:
        folder = config.paths.runs / record.key / "checkpoint_1"
        folder.mkdir(parents=True)
        seal(folder, {"step": 2, "made_from": made_from(ledger.trial(template, record), {"data": "d"})})
    session.refuse_others("d")
    for record in taken[:2]:
        shutil.rmtree(config.paths.runs / record.key)
        shutil.copytree(config.paths.runs / taken[2].key, config.paths.runs / record.key)
    with pytest.raises(InputError) as refused:
        session.refuse_others("d")
    assert str(refused.value).count("made from something else:\n  point.") == 2
    assert taken[2].key not in str(refused.value)
    with pytest.raises(InputError, match=r"data \(content\): d -> e"):
        session.refuse_others("e")


def test_a_kind_without_a_price_ends_the_session_when_it_is_first_held(tmp_path: Path) -> None:
    price = Price(device_hour={"l4": 1.0})
    config = study(tmp_path, trials=4, recipes=(), budget=Budget(money=5), price=price)
    ledger = opened(config)
    session = session_of(config, ledger)
    record = ledger.take()
    for began, kind in ((1.0, "L4"), (2.0, "H100")):
        event = Event(time=began, event="attempt", attempt=Attempt(began=began, devices=1, device=kind))
        ledger.journal.log(record, event)
        if kind == "L4":
            session._changed(record, event)
    with pytest.raises(InputError, match=r"no price for 'h100', .* prices are for l4"):
        session._changed(record, event)
    ended = event.attempt.model_copy(update={"ended": 3.0, "cause": "interrupted"})
    session._changed(record, event.model_copy(update={"attempt": ended}))  # what runs is let go in order
    assert [attempt.device for attempt in opened(config).journal.attempts(record)] == ["L4", "H100"], "nothing is lost"


def test_a_cluster_may_have_nothing_yet(tmp_path: Path) -> None:
    workers = TrialTemplate(workers=WorkersConfig(count=2, cpus_per_worker=4))
    config = study(tmp_path, cluster=ClusterConfig(address="auto"), trial=workers)
    session = session_of(config, opened(config), TrialConfig(workers=workers.workers))
    grows = Growth({"CPU": 1}, (({"CPU": 8, "GPU": 1}, 8),), 8)
    assert session._sized(0, 0, grows).workers.gpus_per_worker == 1
    assert session._sized(0, 0, None).workers.gpus_per_worker == 0
    with pytest.raises(InputError, match=r"needs 2 x {CPU: 3.2, GPU: 1}, for which the nodes that"):
        session._sized(0, 0, replace(grows, nodes=1))
    assert session._most(session._sized(0, 0, grows), 0, 0) is None, "how many fit is for the cluster to say"
    here = session_of(study(tmp_path / "here"), opened(study(tmp_path / "here")), TrialConfig(workers=workers.workers))
    with pytest.raises(InputError, match=r"or give cluster\.address"):
        here._sized(2, 0, None)
    assert here._most(here._sized(16, 0, None), 16, 0) == 2
    assert here._most(here._sized(64, 4, None), 64, 4) == 2, "cores for eight, GPUs for two"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_what_tune_logs_of_a_full_disk_is_told_by_the_study(error: Exception) -> None:
    record = logging.makeLogRecord({"msg": "Trial %s: Error stopping trial.", "exc_info": (type(error), error, None)})
    assert told_by_tune_alone(record) == isinstance(error, RuntimeError)
    assert told_by_tune_alone(logging.makeLogRecord({"msg": "anything else"}))


def test_tune_waits_for_the_first_trial_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Tune warns of a trial that waits; where there is none, it would fail."""
    from ray.tune.execution import insufficient_resources_manager as tune

    for name, value in session_module.TUNE_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for autoscaler in (True, False):
        monkeypatch.setattr(tune, "_is_ray_cluster", lambda autoscaler=autoscaler: autoscaler)
        tune._get_insufficient_resources_warning_threshold.cache_clear()
        manager = tune._InsufficientResourcesManager()
        for hour in range(4):
            monkeypatch.setattr(tune.time, "monotonic", lambda hour=hour: 3600.0 * hour)
            manager.on_no_available_trials([])
