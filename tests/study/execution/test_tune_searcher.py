"""Attempts as the driver accounts for them: written when they begin and end, tried again, counted by their cause."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from study.execution.admission import Place
from study.execution.tune_searcher import LedgerSearcher
from study.ledger.ledger import Ledger
from study.records import read_events
from tests.study.helpers import complete, ended, opened, study
from trainables.config import TrialConfig
from trainables.execution.worker import Patience
from trainables.results import Attempt, Cause

REPORT = {"epoch": 1, "last": False, "history": "[]", "device_seconds": 2.0, "clean/mr_r1": 0.5, "both/mr_r1": 0.1}


class Slots:
    """So many places on nodes of these names; what is asked of them."""

    def __init__(self, *nodes: str) -> None:
        self.free = [Place(id=f"{number:02x}", nodes=(f"host {node}",), kind="l4") for number, node in enumerate(nodes)]
        self.nodes = {f"host {node}" for node in nodes}
        self.asked: list[tuple[int, int]] = []
        self.gone: set[str] = set()
        self.out: dict[str, Sequence[str]] = {}

    def due(self) -> bool:
        return True

    def take(self, running: int, left: int) -> Place | None:
        self.asked.append((running, left))
        return self.free.pop(0) if self.free and left else None

    def give_back(self, place: Place) -> None:
        if place not in self.free:
            self.free.append(place)

    def leave_out(self, bad: Mapping[str, Sequence[str]]) -> None:
        self.out = dict(bad)

    def elsewhere(self, nodes: Collection[str]) -> bool:
        return bool(self.nodes - set(nodes))

    def reclaimed(self) -> set[str]:
        return self.gone


class Time:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def begun(folder: Path, slots: Slots, trials: int = 2, retries: int = 1) -> tuple[Any, Ledger, LedgerSearcher]:
    config = study(folder, trials=trials, recipes=())
    ledger = opened(config)

    def make(record: Any) -> TrialConfig:
        return TrialConfig(key=record.key)

    patience = Patience(retries=retries)
    return (
        config,
        ledger,
        LedgerSearcher(ledger, make, patience, lambda: True, lambda *_: None, Time(), places=slots),
    )


def attempts(config: Any, key: str) -> list[Attempt]:
    return [event.attempt for event in read_events(config.paths.events(key)) if event.attempt is not None]


def keys(suggested: Any) -> Any:
    return suggested["trial"]["key"] if isinstance(suggested, dict) else suggested


def test_only_what_the_cluster_broke_is_counted_and_each_attempt_is_written(tmp_path: Path) -> None:
    config, ledger, searcher = begun(tmp_path, Slots("a"), trials=1)
    causes: list[Cause] = ["preempted", "queued", "preempted", "infrastructure", "preempted", "queued"]
    for number, cause in enumerate(causes):
        suggested = searcher.suggest(str(number))
        assert keys(suggested) == "s-t00000-s0", "though it failed there, as nothing else is left"
        searcher.rung(str(number), {**REPORT, "step": number, "resumed_from_step": -1})
        searcher.on_trial_complete(str(number), ended(None, cause, reason=f"{cause} {number}", failed_on="host a"))
        assert ledger.manifests() == []
    assert isinstance(searcher.suggest("last"), dict)
    searcher.on_trial_complete("last", error=True)
    (manifest,) = ledger.manifests()
    assert (manifest.state, manifest.reason) == (
        "failed",
        "lost 2 times: infrastructure 3; the process of the trial was lost",
    )
    written = attempts(config, "s-t00000-s0")
    assert [attempt.cause for attempt in written[::2]] == [None] * 7
    assert [attempt.cause for attempt in written[1::2]] == [*causes, "infrastructure"]
    assert all(attempt.nodes == ["host a"] and attempt.device == "l4" for attempt in written)
    assert [attempt.device_seconds > 0 for attempt in written[1::2]] == [cause != "queued" for cause in causes] + [True]
    assert [attempt.to_step for attempt in written[1::2]] == [0, 1, 2, 3, 4, 5, 0]


def test_without_devices_nothing_is_proposed_and_the_study_is_not_over(tmp_path: Path) -> None:
    slots = Slots()
    _, ledger, searcher = begun(tmp_path, slots)
    for attempt in range(50):
        assert searcher.suggest(str(attempt)) is None
    assert ledger.records() == [], "no point was drawn, no process started"
    assert slots.asked == [(0, 2)] * 50
    slots.free = Slots("a", "b").free
    assert [keys(searcher.suggest(name)) for name in "ab"] == ["s-t00000-s0", "s-t00001-s0"]
    assert searcher.suggest("c") is None, "one of those may have to be tried again"
    assert slots.asked[-1] == (2, 0), "nothing is kept waiting for"
    searcher.on_trial_complete("a", ended(None, "preempted"))
    searcher.on_trial_complete("b", ended(complete()))
    assert keys(searcher.suggest("d")) == "s-t00000-s0"
    searcher.on_trial_complete("d", ended(complete()))
    assert searcher.suggest("e") == Searcher.FINISHED
    assert [manifest.state for manifest in ledger.manifests()] == ["complete"] * 2


def test_a_trials_process_that_goes_with_its_node_is_preempted(tmp_path: Path) -> None:
    for home in ("there", "here"):
        slots = Slots("a")
        config, ledger, searcher = begun(tmp_path / home, slots, retries=0)
        searcher.suggest("one")
        searcher.rung("one", {"nodes": ["a"], "home": home})
        slots.gone = {"there"}
        searcher.on_trial_complete("one", error=True)
        cause = attempts(config, "s-t00000-s0")[-1].cause
        assert (cause, len(ledger.manifests())) == {"there": ("preempted", 0), "here": ("infrastructure", 1)}[home]


def test_an_attempt_that_is_stopped_lets_its_devices_go_at_once(tmp_path: Path) -> None:
    slots = Slots("a", "b")
    config, ledger, searcher = begun(tmp_path, slots)
    for name, value in (("good", 0.9), ("bad", 0.1)):
        searcher.suggest(name)
        step = {"step": 7, "resumed_from_step": -1, "clean/mr_r1": value, "both/mr_r1": value}
        assert searcher.rung(name, {**REPORT, **step}) == (name == "good")
    assert [place.id for place in slots.free] == ["01"], "before Tune has ended the trial"
    searcher.on_trial_complete("bad")
    ended_as = attempts(config, "s-t00001-s0")[-1]
    assert (ended_as.cause, ended_as.to_step) == ("stopped", 7)
    assert ended_as.reason.startswith("stopped at step 7")
    assert ledger.manifests()[0].state == "stopped"
    searcher.interrupt()
    assert attempts(config, "s-t00000-s0")[-1].cause == "interrupted"
    assert [record.state for record in ledger.records()] == ["running", "stopped"]


def test_a_node_where_trials_fail_that_succeed_elsewhere_is_left_out_also_by_the_next_session(tmp_path: Path) -> None:
    slots = Slots("bad", "good")
    config, _, searcher = begun(tmp_path, slots, trials=3, retries=2)
    first, second = slots.free
    slots.free = [first]
    searcher.suggest("1")
    searcher.on_trial_complete("1", ended(None, "infrastructure", failed_on="host bad", reason="ECC"))
    assert keys(searcher.suggest("2")) == "s-t00001-s0", "the other trial is tried where the first failed"
    searcher.on_trial_complete("2", ended(None, "infrastructure", failed_on="host bad", reason="ECC"))
    slots.free = [second]
    for name, key in (("3", "s-t00001-s0"), ("4", "s-t00000-s0")):
        assert slots.out == {}
        assert keys(searcher.suggest(name)) == key
        searcher.on_trial_complete(name, ended(complete(), nodes=["host good"]))
    assert slots.out == {"host bad": ["s-t00000-s0", "s-t00001-s0"]}
    again = Slots()
    LedgerSearcher(opened(config), searcher._make_trial, Patience(), lambda: True, lambda *_: None, places=again)
    assert again.out == slots.out


def test_where_there_is_no_other_node_a_trial_that_failed_does_not_give_way(tmp_path: Path) -> None:
    _, _, searcher = begun(tmp_path, Slots("only"), trials=3)
    searcher.suggest("1")
    searcher.on_trial_complete("1", ended(None, "infrastructure", failed_on="host only"))
    assert keys(searcher.suggest("2")) == "s-t00000-s0", "not after all the others"


def test_a_report_without_an_evaluation_is_no_rung_and_what_is_told_again_is_logged_once(tmp_path: Path) -> None:
    config, ledger, searcher = begun(tmp_path, Slots("a"), trials=1)
    first = searcher.suggest("1")
    assert isinstance(first, dict)
    assert (first["patience"]["held_seconds"], first["patience"]["logged_step"]) == (0, -1)
    rung = {**REPORT, "step": 8, "resumed_from_step": -1}
    only = {name: rung[name] for name in ("epoch", "last", "device_seconds", "resumed_from_step")}
    for report in ({**only, "step": 5}, rung, {**only, "step": 11}):
        assert searcher.rung("1", report)
    searcher.on_trial_complete("1", ended(None, "preempted"))
    again = searcher.suggest("2")
    assert isinstance(again, dict)
    assert again["patience"]["held_seconds"] > 0
    assert again["patience"]["logged_step"] == 8
    for report in (rung, {**rung, "step": 16}):
        searcher.rung("2", {**report, "resumed_from_step": 11})
    events = list(read_events(config.paths.events("s-t00000-s0")))
    assert [event.step for event in events if event.event == "rung"] == [8, 16]
    assert [event.step for event in events if event.event == "resume"] == [11]
    written = attempts(config, "s-t00000-s0")
    assert [(attempt.from_step, attempt.to_step) for attempt in written] == [(0, 0), (0, 11), (0, 0)]
    assert ledger.manifests() == []
