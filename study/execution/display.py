"""What the person at the terminal sees: a live table, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from study.config import Objective
from study.front.estimates import FrontEntry
from study.records import Event, Manifest, TrialRecord


@dataclass
class Row:
    """A trial as it is shown."""

    record: TrialRecord
    state: str = "running"
    step: int = 0
    values: dict[str, str] = field(default_factory=dict)
    note: str = ""


class Display:
    """Shows a running study. Use as a context manager; safe to call from any thread."""

    SHOWN = 16
    """Rows of the live table: the running trials and the last ended ones."""

    def __init__(self, title: str, objectives: Sequence[Objective], total: int, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 180)
        self._title, self._objectives, self._total = title, objectives, total
        self._rows: dict[int, Row] = {}
        self._front: set[str] = set()
        self._share, self._ended, self._ended_here = 0.0, 0, 0
        self._started = time.time()
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(Text(line), soft_wrap=True)

    def print(self, table: Table) -> None:
        """A table that stays."""
        self._console.print(table)

    def seen(self, record: TrialRecord, manifest: Manifest) -> None:
        """A trial that ended in an earlier session."""
        self._rows[record.number] = self._ended_row(record, manifest)
        self._ended += 1

    def changed(self, record: TrialRecord, what: Event | Manifest) -> None:
        """Something happened to a trial."""
        with self._lock:
            row = self._rows.setdefault(record.number, Row(record))
            name = record.recipe or "searched"
            if isinstance(what, Manifest):
                self._rows[record.number] = row = self._ended_row(record, what)
                self._ended += 1
                self._ended_here += 1
                line = f"{what.state}  {_pairs(row.values)}  {what.reason or ''}".rstrip()
                line += f"  [{self._ended}/{self._total}{self._remaining()}]"
            elif what.event == "rung":
                row.step, row.state = what.step, "running"
                row.values = self._values(what.metrics)
                line = f"rung at step {what.step}  {_pairs(row.values)}"
            else:
                row.note = what.message if what.event == "resume" else row.note
                line = {"start": "started", "resume": "resumed", "end": ""}[what.event] + f"  {what.message}"
        if self._live is None:
            self.say(f"{time.strftime('%H:%M:%S')}  {record.key}  {name}  {line}")

    def front(self, entries: Sequence[FrontEntry], share: float) -> None:
        """The front moved."""
        with self._lock:
            moved = {entry.key for entry in entries} != self._front
            self._front, self._share = {entry.key for entry in entries}, share
        if moved and self._live is None:
            self.say(f"{time.strftime('%H:%M:%S')}  front: {len(entries)} points, hypervolume {share:.3f}")

    def _ended_row(self, record: TrialRecord, manifest: Manifest) -> Row:
        metrics = {name: metric.value for name, metric in manifest.metrics.items()}
        if manifest.state == "stopped" and manifest.rungs:
            metrics = manifest.rungs[max(manifest.rungs)]
        note = (manifest.reason or "").splitlines()[0] if manifest.reason else ""
        return Row(record, manifest.state, int(manifest.cost.get("steps", 0)), self._values(metrics), note)

    def _values(self, metrics: dict[str, float]) -> dict[str, str]:
        return {o.metric: f"{metrics[o.metric]:.3f}" for o in self._objectives if o.metric in metrics}

    def _remaining(self) -> str:
        left = self._total - self._ended
        if not self._ended_here or left <= 0:
            return ""
        seconds = (time.time() - self._started) / self._ended_here * left
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    def _table(self) -> Group:
        with self._lock:
            rows = sorted(self._rows.values(), key=lambda row: (row.state == "running", row.record.number))
            head = f"{self._title}: {self._ended}/{self._total} trials, {len(self._front)} on the front, "
            head += f"hypervolume {self._share:.3f}{self._remaining()}"
            table = Table(box=None, pad_edge=False)
            for name in ("trial", "recipe", "state", "step", *(o.metric for o in self._objectives), "front", ""):
                table.add_column(name)
            for row in rows[-self.SHOWN :]:
                star = "*" if row.record.key in self._front else ""
                values = [row.values.get(o.metric, "") for o in self._objectives]
                cells = [row.record.key, row.record.recipe or "", row.state, str(row.step), *values, star, row.note]
                table.add_row(*(Text(cell) for cell in cells))
            return Group(Text(head, style="bold"), table)


def front_table(entries: Sequence[FrontEntry], manifests: Sequence[Manifest], objectives: Sequence[Objective]) -> Table:
    """The front with intervals, and below it the recipes that are not on it."""
    table = Table(title="Pareto front, and the recipes beside it", title_justify="left", box=None, pad_edge=False)
    for name in ("", "trial", *(objective.metric for objective in objectives), "training", "parameters"):
        table.add_column(name)
    on_front = {entry.key for entry in entries}
    costs = _training_costs(manifests)
    for entry in entries:
        cells = [
            f"{entry.values[o.metric]:.3f} [{entry.intervals[o.metric][0]:.3f}, {entry.intervals[o.metric][1]:.3f}]"
            for o in objectives
        ]
        what = (f"{entry.recipe}: " if entry.recipe else "") + _settings(entry.params)
        table.add_row(*(Text(cell) for cell in ("*", entry.key, *cells, costs.get(entry.key, ""), what)))
    for manifest in manifests:
        if manifest.recipe is None or manifest.key in on_front or manifest.state != "complete":
            continue
        metrics = [manifest.metrics.get(objective.metric) for objective in objectives]
        cells = [f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]" if m else "" for m in metrics]
        what = f"{manifest.recipe}: {_settings(manifest.params)}"
        table.add_row(*(Text(cell) for cell in ("", manifest.key, *cells, costs.get(manifest.key, ""), what)))
    return table


def _training_costs(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Seconds of training with its attack, and how many times that of MAT, as the papers compare."""
    seconds = {
        manifest.key: spent.get("attack", 0.0) + spent.get("train", 0.0)
        for manifest in manifests
        if (spent := manifest.cost.get("seconds"))
    }
    mat = next((seconds.get(manifest.key) for manifest in manifests if manifest.recipe == "mat"), None)
    return {key: f"{value:.0f} s" + (f" x{value / mat:.2f}" if mat else "") for key, value in seconds.items()}


def _settings(params: dict[str, object]) -> str:
    parts = []
    for name, value in params.items():
        if name == "epsilon" and isinstance(value, float):
            parts.append(f"epsilon={255 * value:.2f}/255")
        else:
            parts.append(f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}")
    return " ".join(parts)


def _pairs(values: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())
