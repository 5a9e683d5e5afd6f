"""What the person at the terminal sees: a live table, or plain lines where there is no terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from search_spaces.notation import SYMBOLS, number, ordered, written
from search_spaces.recipes import title
from study.config import Objective
from study.front.estimates import CONFIDENCE, FrontEntry, estimates, excerpt
from study.ledger.attempts import ENDS, in_words
from study.paths import short_key
from study.records import Event, Manifest, TrialRecord
from trainables.results import Metric

UNKNOWN_WIDTH = 180
"""Of what is no terminal, in columns, unless COLUMNS says more."""

RUNG = "~"
"""Before a value of a small evaluation: of fewer images under a weaker attack, so it is no final value."""

RUNG_LEGEND = f"{RUNG} at a rung: fewer images and a weaker attack, so higher than the final value will be"


def terminal() -> Console:
    """This process's output."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else UNKNOWN_WIDTH)


@dataclass
class Row:
    """A trial as it is shown."""

    record: TrialRecord
    state: str = "started"
    values: dict[str, str] = field(default_factory=dict)
    note: str = ""
    ended: bool = False


class Display:
    """Shows a running study. Use as a context manager; safe to call from any thread.

    Args:
        title: of the study.
        objectives: whose values are shown.
        knobs: names of those that are searched.
        settings: what a trial trains with, by the names of its point.
        planned: how many trials there will be, as far as is known.
        console: where to.
    """

    SHOWN = 16
    """Rows of the live table: the running trials and the last ended ones."""

    NOTE = 12
    """Columns from which on there is room for what is to be said of a trial."""

    def __init__(
        self,
        title: str,
        objectives: Sequence[Objective],
        knobs: Sequence[str],
        settings: Callable[[TrialRecord], Mapping[str, Any]],
        planned: Callable[[], int],
        console: Console | None = None,
    ) -> None:
        self._console = console or terminal()
        self._title, self._objectives, self._knobs = title, objectives, ordered(knobs)
        self._settings, self._planned = settings, planned
        self._rows: dict[int, Row] = {}
        self._front: set[str] = set()
        self._share, self._ended, self._ended_here = 0.0, 0, 0
        self._total = planned()
        self._started = time.time()
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=2)
            self._live.start()
        else:
            self.say(RUNG_LEGEND)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(Text(line), soft_wrap=True)

    def print(self, shown: RenderableType) -> None:
        """A table that stays."""
        self._console.print(shown)

    def seen(self, record: TrialRecord, manifest: Manifest) -> None:
        """A trial that ended in an earlier session."""
        self._rows[record.number] = self._ended_row(record, manifest)
        self._ended += 1

    def changed(self, record: TrialRecord, what: Event | Manifest) -> None:
        """Something happened to a trial."""
        with self._lock:
            row = self._rows.setdefault(record.number, Row(record))
            if isinstance(what, Manifest):
                self._rows[record.number] = row = self._ended_row(record, what)
                self._ended += 1
                self._ended_here += 1
                self._total = self._planned()  # replicates are planned when the searched trials have ended
                line = f"{what.state}  {_pairs(row.values)}  {what.reason or ''}".rstrip()
                line += f"  [{self._ended}/{self._total}{self._remaining()}]"
            elif what.event == "rung":
                row.state = f"step {what.step}"
                row.values = self._values(what.metrics, RUNG)
                line = f"rung at step {what.step}  {_pairs(row.values)}"
            elif what.event == "start":
                line = f"started  {what.message}"
            elif what.event == "resume":
                row.state, row.note = f"step {what.step}", what.message
                line = f"resumed  {what.message}"
            elif what.attempt is not None and what.attempt.ended is None:
                row.state = "started"
                return  # where it goes on from is told next
            elif what.attempt is not None and what.attempt.cause not in ENDS:
                row.state, row.note = "waiting", in_words(what.attempt)
                line = row.note
            else:
                return  # the manifest comes next and says more
        if self._live is None:
            name = record.recipe or "searched"
            self.say(f"{time.strftime('%H:%M:%S')}  {record.key}  {name}  {line}".rstrip())

    def front(self, entries: Sequence[FrontEntry], share: float) -> None:
        """The front moved."""
        with self._lock:
            moved = {entry.key for entry in entries} != self._front
            self._front, self._share = {entry.key for entry in entries}, share
        if moved and self._live is None:
            points = f"{len(entries)} point{'s' * (len(entries) != 1)}"
            self.say(f"{time.strftime('%H:%M:%S')}  front: {points}, hypervolume {share:.3g}")

    def _ended_row(self, record: TrialRecord, manifest: Manifest) -> Row:
        metrics, mark = {name: metric.value for name, metric in manifest.metrics.items()}, ""
        if manifest.state == "stopped" and manifest.rungs:
            metrics, mark = manifest.rungs[max(manifest.rungs)], RUNG
        note = (manifest.reason or "").splitlines()[0] if manifest.reason else ""
        return Row(record, manifest.state, self._values(metrics, mark), note, ended=True)

    def _values(self, metrics: Mapping[str, float], mark: str) -> dict[str, str]:
        return {o.metric: mark + _short(number(metrics[o.metric])) for o in self._objectives if o.metric in metrics}

    def _remaining(self) -> str:
        left = self._total - self._ended
        if not self._ended_here or left <= 0:
            return ""
        seconds = (time.time() - self._started) / self._ended_here * left
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    def _table(self) -> Group:
        with self._lock:
            rows = sorted(self._rows.values(), key=lambda row: (not row.ended, row.record.number))
            rows = rows[-self.SHOWN :]
            head = f"{self._title}: {self._ended}/{self._total} trials, {len(self._front)} on the front, "
            head += f"hypervolume {self._share:.3g}{self._remaining()}"
            knobs = self._knobs if _width(self._trials(rows, self._knobs)) <= self._console.width else []
            legend = [_legend(knobs)] if knobs else []
            if any(value.startswith(RUNG) for row in rows for value in row.values.values()):
                legend.append(RUNG_LEGEND)
            room = self._console.width - _width(self._trials(rows, knobs)) - 1
            table = self._trials(rows, knobs, room if room >= self.NOTE else 0)
            return Group(Text(head, style="bold"), table, *(Text(line, style="dim") for line in legend))

    def _trials(self, rows: Sequence[Row], knobs: Sequence[str], note_width: int = 0) -> Table:
        table = _bare_table()
        for name in (" trial", "recipe", "state"):
            table.add_column(name, no_wrap=True)
        for objective in self._objectives:
            table.add_column(objective.metric.replace("/", "\n"), justify="right", no_wrap=True)
        _add_knobs(table, knobs)
        if note_width:
            table.add_column("", no_wrap=True, overflow="ellipsis", max_width=note_width)
        for row in rows:
            values = [row.values.get(o.metric, "") for o in self._objectives]
            key = _starred(row.record.key, row.record.key in self._front)
            cells = [key, title(row.record.recipe), row.state, *values]
            cells += [*_knob_cells(knobs, self._settings(row.record)), *[row.note] * (note_width > 0)]
            table.add_row(*map(Text, cells))
        return table


@dataclass(frozen=True)
class FrontTable:
    """The front with intervals, and below it the recipes that are not on it; two tables where one is too wide.

    Attributes:
        objectives: a column each.
        knobs: a column each.
        rows: trial and recipe; probability and objectives; cost of training and knobs.
        left_out: points of the front that have no row.
        confidence: of the intervals.
        sources: what they are over.
    """

    objectives: Sequence[Objective]
    knobs: Sequence[str]
    rows: Sequence[tuple[list[str], list[str], list[str]]]
    left_out: int
    confidence: float
    sources: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """As wide as it may be."""
        yield Text("Pareto front, and the recipes beside it", style="italic")
        whole = self._table(values=True, knobs=True)
        if _width(whole) <= options.max_width:
            yield whole
        else:
            yield self._table(values=True, knobs=False)
            yield Text()
            yield self._table(values=False, knobs=True)
        if self.left_out:
            yield Text(f"and {self.left_out} more on the front; the rows are spread over the objectives")
        legend = f"* on the front, with probability p over {self.sources}, as the "
        legend += f"{100 * self.confidence:g} % intervals are; training: seconds "
        yield Text(f"{legend}with its attack, and how many times MAT's; {_legend(self.knobs)}", style="dim")

    def _table(self, *, values: bool, knobs: bool) -> Table:
        table = _bare_table()
        for name in (" trial", "recipe"):
            table.add_column(name, no_wrap=True)
        if values:
            table.add_column("p", justify="right", no_wrap=True)
            for objective in self.objectives:
                table.add_column(objective.metric, overflow="fold")
        if knobs:
            table.add_column("training", no_wrap=True)
            _add_knobs(table, self.knobs)
        for head, measured, settings in self.rows:
            table.add_row(*map(Text, [*head, *measured * values, *settings * knobs]))
        return table


def front_table(
    entries: Sequence[FrontEntry],
    manifests: Sequence[Manifest],
    objectives: Sequence[Objective],
    confidence: float = CONFIDENCE,
) -> FrontTable:
    """What there is to say of the front at the end.

    Args:
        entries: the front.
        manifests: all ended trials.
        objectives: of the study.
        confidence: of the intervals.
    """
    knobs = ordered(name for manifest in manifests for name in manifest.params)
    of = {estimate.first.key: estimate for estimate in estimates(manifests, objectives, confidence)}
    probabilities = {entry.key: entry.probability for entry in entries}
    others = [key for key, estimate in of.items() if estimate.first.recipe and key not in probabilities]
    costs = _training_costs(manifests)
    rows = []
    members = excerpt([of[key] for key in probabilities], objectives)
    for key in [*(one.first.key for one in members), *others]:
        first, metrics = of[key].first, of[key].metrics
        probability = f"{probabilities[key]:.2f}" if key in probabilities else ""
        head = [_starred(key, key in probabilities), title(first.recipe)]
        values = [probability, *(_with_interval(metrics[objective.metric]) for objective in objectives)]
        settings = _knob_cells(knobs, {**first.params, **first.point})
        rows.append((head, values, [costs.get(key, ""), *settings]))
    sources = next((one.training.sources for one in of.values()), "images")
    return FrontTable(objectives, knobs, rows, len(entries) - len(members), confidence, sources)


def _training_costs(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Seconds of training with its attack, and how many times that of MAT, as the papers compare."""
    seconds = {manifest.key: spent for manifest in manifests if (spent := _training_seconds(manifest)) is not None}
    mat = next((seconds.get(manifest.key) for manifest in manifests if manifest.recipe == "mat"), None)
    return {key: f"{value:.0f} s" + (f" x{value / mat:.1f}" if mat else "") for key, value in seconds.items()}


def _training_seconds(manifest: Manifest) -> float | None:
    """Of all steps, at the pace of the last attempt; None where that had none left to do."""
    spent, steps = manifest.cost.get("seconds"), manifest.cost.get("steps", 1)
    begun = (manifest.cost.get("resumed_from_steps") or [0])[-1]
    if not spent or begun >= steps:
        return None
    return float((spent.get("attack", 0.0) + spent.get("train", 0.0)) * steps / (steps - begun))


def _short(text: str) -> str:
    """A number without the zero before the point, as tables of recalls have it."""
    return text[1:] if text.startswith("0.") else text


def _starred(key: str, on_front: bool) -> str:
    return ("*" if on_front else " ") + short_key(key)


def _with_interval(metric: Metric) -> str:
    """One word for each, so that a narrow column breaks between them only."""
    if metric.low == metric.high:
        return _short(number(metric.value))
    return f"{_short(number(metric.value))} [{_short(number(metric.low))},{_short(number(metric.high))}]"


def _bare_table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))


def _width(table: Table) -> int:
    """In columns, if nothing is cut or broken."""
    return Console(width=10_000).measure(table).maximum


def _add_knobs(table: Table, knobs: Sequence[str]) -> None:
    for name in knobs:
        table.add_column(SYMBOLS[name].plain if name in SYMBOLS else name, justify="right", no_wrap=True)


def _knob_cells(knobs: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Without a radius there are no steps to tell."""
    idle = {"attack_steps"} if not settings.get("epsilon", True) else set()
    shown = {name: _short(written(name, settings[name])) for name in knobs if name in settings and name not in idle}
    return [shown.get(name, "-") for name in knobs]


def _legend(knobs: Sequence[str]) -> str:
    """What the symbols mean that say it least."""
    return "; ".join(f"{SYMBOLS[name].plain}: {SYMBOLS[name].meaning}" for name in knobs if name in SYMBOLS)


def _pairs(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())
