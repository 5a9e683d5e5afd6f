"""Drawn lives of a study: trials that are tried again and again, by drivers that are killed at any of their writes.

What the ledger says of device-seconds is held against an account that is kept beside it, in the words of the design:
cost is device-seconds held, summed over attempts however they ended; waiting is none.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy.pool import StaticPool

from study.config import Budget, Objective, StudyConfig
from study.export import attempt_rows
from study.ledger import journal
from study.ledger import ledger as ledger_module
from study.ledger.attempts import read_attempts
from study.ledger.frozen import freeze
from study.ledger.ledger import Ledger, read_records
from study.ledger.sessions import SESSIONS, make_sessions_table, sessions
from study.ledger.set_aside import retry_failed, set_aside
from study.records import Event, Manifest, TrialRecord, append_event, read_events, read_manifests, write_manifest
from tests.study.helpers import complete, study
from trainables.config import TrialConfig
from trainables.results import Attempt, Cause, Outcome

COST = Objective(metric="cost/device_seconds", direction="minimize", low=0, high=10_000)
BEAT, LAST_STEP = 10, 4
DEVICES: list[tuple[float, str]] = [(1, ""), (2, "L4"), (0.5, "H100")]
LOSSES: list[Cause] = ["preempted", "infrastructure", "queued"]


class Killed(BaseException):
    """As SIGKILL: nothing below catches it."""


@dataclass
class Held:
    """An attempt as it was."""

    key: str
    devices: float
    kind: str
    began: float
    ended: float | None = None
    aside: bool = False

    def seconds(self, now: float) -> float:
        return self.devices * ((now if self.ended is None else self.ended) - self.began)


@dataclass
class Life:
    """A study, and what happens to it whatever its driver writes of it."""

    config: StudyConfig
    storage: optuna.storages.RDBStorage
    draw: random.Random
    kills: int
    mark: str
    now: float = 1000.0
    writes_left: int = 0
    beat: float = 0.0
    held: list[Held] = field(default_factory=list)
    last_logged: dict[str, float] = field(default_factory=dict)
    checkpoints: Counter[str] = field(default_factory=Counter)
    rungs: dict[str, dict[int, float]] = field(default_factory=dict)

    def clock(self) -> float:
        return self.now

    def passes(self, most: float = 40, alive: bool = True) -> None:
        """Time does, in quarters of seconds, so that sums are exact. A driver that lives gives signs of life."""
        self.now += 0.25 * self.draw.randint(1, int(4 * most))
        if alive:
            self.beat += BEAT * ((self.now - self.beat) // BEAT)
            with self.storage.engine.begin() as connection:
                connection.execute(SESSIONS.update().where(SESSIONS.c.ended.is_(None)).values(heartbeat=self.beat))

    def fuse(self) -> bool:
        """Whether the driver is killed at this write."""
        self.writes_left -= 1
        return self.kills > 0 and self.writes_left == 0

    def append(self, path: Any, event: Event) -> None:
        if self.fuse():
            line = event.model_dump_json().encode()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(line[: self.draw.randrange(len(line))])
            raise Killed
        append_event(path, event)
        self.last_logged[path.parent.name] = event.time

    def write(self, path: Any, manifest: Manifest) -> Manifest:
        if self.fuse():
            if self.draw.random() < 0.5:
                write_manifest(path, manifest)
            raise Killed
        return write_manifest(path, manifest)

    def total(self) -> dict[str, float]:
        """Device-seconds that were held until now, by kind."""
        found: Counter[str] = Counter()
        for one in self.held:
            found[one.kind.lower() or "cpu"] += one.seconds(self.now)
        return nonzero(found)

    def of(self, key: str) -> list[Held]:
        return [one for one in self.held if one.key == key and not one.aside]


def nonzero(held: Any) -> dict[str, float]:
    return {kind: seconds for kind, seconds in held.items() if seconds}


def value(key: str, step: int) -> float:
    return random.Random(f"{key} {step}").random()


@dataclass
class Try:
    """An attempt under way."""

    record: TrialRecord
    trial: TrialConfig
    attempt: Attempt
    truth: Held


class Driver:
    """Does what a session does, with several trials at once, in any order."""

    def __init__(self, life: Life) -> None:
        self.life = life
        with life.storage.engine.begin() as connection:
            connection.execute(SESSIONS.update().where(SESSIONS.c.ended.is_(None)).values(ended=SESSIONS.c.heartbeat))
            fields = {"study": life.config.name, "host": "h", "process": 1, "process_started": 0, "device": ""}
            connection.execute(SESSIONS.insert().values(**fields, started=life.now, heartbeat=life.now))
        life.beat = life.now
        self.ledger = Ledger(life.config, life.config.paths, life.mark, life.clock, database=life.storage)
        self.queue = self.ledger.remaining().resume
        self.running: list[Try] = []

    def work(self) -> None:
        draw = self.life.draw
        while True:
            self.life.passes()
            assert nonzero(self.ledger.journal.held("nobody")) == self.life.total()
            if len(self.running) < 3 and draw.random() < 0.5 and self.begin():
                continue
            if not self.running:
                if not self.begin():
                    return
                continue
            one = draw.choice(self.running)
            chance = draw.random()
            if chance < 0.6:
                self.step(one)
            elif chance < 0.85:
                self.close(one, draw.choice(LOSSES))
                self.queue.append(one.record.number)
            elif chance < 0.92:
                self.end(one, "bug", Outcome(state="failed", reason="KeyError"))
            else:
                self.end(one, "out_of_memory", Outcome(state="infeasible", reason="OutOfMemoryError"))

    def begin(self) -> bool:
        record = self.ledger.take(self.queue.pop(0)) if self.queue else self.ledger.take_next()
        if record is None:
            return False
        trial = TrialConfig(key=record.key)
        if (reason := self.ledger.journal.verdict(record)) is not None:
            self.ledger.stop(record, reason, trial)
            return True
        devices, kind = self.life.draw.choice(DEVICES)
        step = self.life.checkpoints[record.key]
        attempt = Attempt(began=self.life.now, devices=devices, device=kind, from_step=step, to_step=step)
        truth = Held(record.key, devices, kind, self.life.now)
        self.log(record, attempt)
        self.life.held.append(truth)
        self.running.append(Try(record, trial, attempt, truth))
        if step:
            self.report(self.running[-1], step)
        return True

    def log(self, record: TrialRecord, attempt: Attempt) -> None:
        self.ledger.journal.log(
            record, Event(time=self.life.now, event="attempt", step=attempt.to_step, attempt=attempt)
        )

    def step(self, one: Try) -> None:
        """The worker writes a checkpoint, and then it is reported."""
        step = self.life.checkpoints[one.record.key] = min(LAST_STEP, self.life.checkpoints[one.record.key] + 1)
        self.report(one, step)

    def report(self, one: Try, step: int) -> None:
        key, ledger = one.record.key, self.ledger
        one.attempt = one.attempt.model_copy(update={"to_step": step})
        if not ledger.journal.logged(one.record, step):
            held = ledger.journal.device_seconds(one.record)
            assert held == sum(each.seconds(self.life.now) for each in self.life.of(key))
            metrics = {"clean/mr_r1": value(key, step), "cost/device_seconds": held}
            last = step == LAST_STEP
            reason = None if last else ledger.rung(one.record, step, step, metrics)
            kind: Any = "final" if last else "rung"
            event = Event(time=self.life.now, event=kind, step=step, metrics=metrics, message=reason or "")
            ledger.journal.log(one.record, event)
            if not last:
                self.life.rungs.setdefault(key, {})[step] = held
            if reason is not None:
                self.close(one, "stopped")
                ledger.stop(one.record, reason, one.trial)
                return
        if step == LAST_STEP:
            self.end(one, "complete", complete(value(key, LAST_STEP), 0.1, device_seconds=0.5))

    def close(self, one: Try, cause: Cause) -> None:
        ended = one.truth.began if cause == "queued" else self.life.now
        self.log(one.record, one.attempt.model_copy(update={"ended": ended, "cause": cause}))
        one.truth.ended = ended
        self.running.remove(one)

    def end(self, one: Try, cause: Cause, outcome: Outcome) -> None:
        if self.life.draw.random() < 0.8:
            self.close(one, cause)
            self.life.passes(2)
            self.ledger.finish(one.record, outcome, one.trial)
        else:  # the account closes what is open
            self.running.remove(one)
            now = self.life.now
            self.ledger.finish(one.record, outcome, one.trial)
            one.truth.ended = now


def lived(folder: Path, storage: optuna.storages.RDBStorage, seed: int, monkeypatch: pytest.MonkeyPatch) -> Life:
    """Drivers, until the study is done."""
    draw = random.Random(seed)
    config = study(
        folder,
        name=f"s{seed}",
        budget=Budget(trials=3),
        objectives=(Objective(metric="clean/mr_r1"), COST),
        sampler="random",
        replicates=draw.randrange(2),
    )
    config.paths.root.mkdir(parents=True)
    mark = freeze(config, {"mark": 1}, accept_changes=True)
    life = Life(config, storage, draw, draw.randint(0, 8), mark)
    monkeypatch.setattr(journal, "append_event", life.append)
    monkeypatch.setattr(ledger_module, "write_manifest", life.write)
    while True:
        life.writes_left = draw.randint(1, 25)
        again(life)
        try:
            driver = Driver(life)
            driver.work()
            done = not driver.queue
        except Killed:
            done = False
            life.kills -= 1
            for one in life.held:
                if one.ended is None:
                    one.ended = max(one.began, life.beat, life.last_logged[one.key])
            check_view(life)
        if done and life.kills <= 0:
            return life
        life.kills -= done
        life.passes(500, alive=False)


def again(life: Life) -> None:
    """What people ask of a study that nobody works on."""
    config, draw = life.config, life.draw
    records = read_records(config.name, life.storage)
    if draw.random() < 0.3:
        retry_failed(config.paths, records)
    ended = [r.key for r in records if r.state not in ("waiting", "running") and config.paths.manifest(r.key).exists()]
    if ended and draw.random() < 0.15:
        key = draw.choice(ended)
        set_aside(config.paths, records, [key])
        for one in life.of(key):
            one.aside = True
        life.checkpoints.pop(key, None)
        life.rungs.pop(key, None)


def check_view(life: Life) -> None:
    """Another process sees the same, before the next driver has closed anything."""
    records = read_records(life.config.name, life.storage)
    manifests = read_manifests(life.config.paths, records)
    rows = sessions(life.storage.engine, life.config.name)
    seen = read_attempts(life.config.paths, records, manifests, rows)
    assert nonzero(seen.held(life.now, "nobody")) == life.total()


@pytest.fixture(scope="module")
def database() -> optuna.storages.RDBStorage:
    """In memory, and so outlives every driver."""
    storage = optuna.storages.RDBStorage(
        "sqlite://", engine_kwargs={"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    )
    make_sessions_table(storage.engine)
    return storage


def test_every_account_adds_up(
    tmp_path: Path, database: optuna.storages.RDBStorage, long_chaos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(400 if long_chaos else 6):
        life = lived(tmp_path, database, seed, monkeypatch)
        monkeypatch.undo()
        check_view(life)
        paths = life.config.paths
        stored = database.get_all_trials(database.get_study_id_from_name(life.config.name))
        records = read_records(life.config.name, database)
        manifests = read_manifests(paths, records)
        assert len(manifests) == len(records) == len(stored), "each is counted once"
        for manifest in manifests:
            tries = life.of(manifest.key)
            held = sum(one.seconds(life.now) for one in tries)
            assert manifest.cost["device_seconds"] == held, (seed, manifest.key)
            assert [one.began for one in manifest.attempts] == [one.began for one in tries]
            rows = list(attempt_rows(manifest.key, manifest.attempts))
            assert sum(row["device_seconds"] for row in rows) == held
            rungs = life.rungs.get(manifest.key, {})
            assert {step: row["cost/device_seconds"] for step, row in manifest.rungs.items()} == rungs
            assert all(row["clean/mr_r1"] == value(manifest.key, step) for step, row in manifest.rungs.items())
            logged = [e.step for e in read_events(paths.events(manifest.key)) if e.event in ("rung", "final")]
            assert len(logged) == len(set(logged)), "a step is logged once"
            if manifest.state == "complete":
                assert set(rungs) == set(range(1, LAST_STEP))
                assert stored[manifest.number].values == [value(manifest.key, LAST_STEP), held]
