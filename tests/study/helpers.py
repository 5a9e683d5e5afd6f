"""A study with a ledger and without Ray: trials that take no time and end as they are told."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search_spaces.joint import JOINT
from study.config import Budget, Objective, StudyConfig
from study.ledger.frozen import freeze
from study.ledger.ledger import Ledger
from study.records import Event, Manifest
from trainables.config import TrialConfig
from trainables.results import Attempt, Cause, Metric, Outcome, TrialResult
from trainables.trial import closing


def study(folder: Path, trials: int = 2, **fields: Any) -> StudyConfig:
    """A study of two recipes and so many searched trials."""
    given: dict[str, Any] = {
        "name": "s",
        "studies_dir": folder,
        "space": JOINT,
        "recipes": ("finetune", "fare"),
        "objectives": (Objective(metric="clean/mr_r1"), Objective(metric="both/mr_r1")),
        "budget": Budget(trials=trials),
    }
    return StudyConfig(**{**given, **fields})


def opened(config: StudyConfig) -> Ledger:
    """Its ledger, with the study frozen."""
    config.paths.root.mkdir(parents=True, exist_ok=True)
    return Ledger(config, config.paths, freeze(config, {"mark": 1}, accept_changes=True))


def complete(clean: float = 0.5, both: float = 0.1, device_seconds: float = 1) -> Outcome:
    """A trial that measured so much."""
    values = {"clean/mr_r1": clean, "both/mr_r1": both}
    return Outcome(
        state="complete",
        result=TrialResult(
            metrics={name: Metric(value=value, low=value - 0.01, high=value + 0.01) for name, value in values.items()},
            split="val",
            correct={},
            queries={},
            device_seconds=device_seconds,
            seconds={"train": device_seconds},
            steps=1,
            resumed_from_steps=[],
            temperature=0.1,
            hashes={},
            versions={},
        ),
    )


def ended(outcome: Outcome | None, cause: Cause | None = None, **fields: Any) -> dict[str, Any]:
    """The last report of an attempt, of a trial that ended so or is to be tried again."""
    causes: dict[str, Cause] = {"complete": "complete", "infeasible": "point", "failed": "bug"}
    found = cause or causes[outcome.state if outcome else "failed"]
    return closing(Attempt(began=0, ended=1, devices=1, cause=found, **fields), outcome)


def run_next(ledger: Ledger, config: StudyConfig, outcome: Outcome, held: float = 0.5) -> Manifest:
    """Take a trial, log a rung, and end it."""
    record = ledger.take()
    ledger.journal.log(record, Event(time=time.time(), event="start", message="begun"))
    history = [{"step": 1, "time": time.time(), "loss": 2.0}]
    rung = {"clean/mr_r1": 0.3, "cost/device_seconds": held}
    ledger.rung(record, 2, 1, rung)
    ledger.journal.log(record, Event(time=time.time(), event="rung", step=2, metrics=rung, history=history))
    return ledger.finish(record, outcome, TrialConfig())


def forked(work: Callable[[], object]) -> int:
    """Do it in a process of its own, whose number this is; its exit code is 1 if it raises."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child
