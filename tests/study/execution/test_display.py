"""The terminal's tables at the widths that terminals have, and the lines of a study without one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from search_spaces.joint import FUSION, JOINT
from study.config import Objective
from study.execution.display import Display, _training_costs, front_table, terminal
from study.front.estimates import front
from study.records import Event, Manifest, TrialRecord
from trainables.config import Point
from trainables.results import Attempt

OBJECTIVES = tuple(Objective(metric=name) for name in ("clean/mr_r5", "image/mr_r5", "both/mr_r5", "both.itm/mr_r5"))
PARAMS = {
    "contrastive_weight": 0.005678,
    "temperature": 0.065786,
    "temperature_learned": False,
    "epsilon": 0.0035,
    "attack_steps": 10,
    "words": 1,
    "trainable": "fusion",
}


def manifest(number: int, values: Sequence[float], **changes: Any) -> Manifest:
    params = {} if "recipe" in changes else {**PARAMS, "words": number % 3}
    fields = {
        "key": f"my-study-t{number:05d}-s0",
        "number": number,
        "recipe": None,
        "params": params,
        "point": Point.model_validate(params).model_dump(mode="json"),
        "state": "complete",
        "metrics": {
            objective.metric: {"value": value, "low": value - 0.05, "high": value + 0.04}
            for objective, value in zip(OBJECTIVES, values, strict=False)
        },
        "cost": {"device_seconds": 12.0, "steps": 42, "seconds": {"train": 3.0, "attack": 9.0}},
        "fingerprint": "f",
        "ended": float(number),
    }
    return Manifest.model_validate(fields | changes)


TRIALS = [
    manifest(0, [0.662, 0.581, 0.105, 0.2], recipe="tecoa_itr"),
    manifest(1, [0.5, 0.5, 0.05, 0.1], recipe="mat"),
    *(manifest(number, [0.9 - number / 20, 0.5, number / 20, 0.3]) for number in range(2, 8)),
]


def shown(renderable: Any, width: int) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [80, 100, 140, 200])
@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_front_table_tells_every_value_and_every_knob_at_any_width(width: int, objectives: int) -> None:
    axes = OBJECTIVES[:objectives]
    text = "\n".join(shown(front_table(front(TRIALS, axes), TRIALS, axes), width))
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    words = text.split()
    for entry in front(TRIALS, axes):
        for metric, (low, high) in entry.intervals.items():
            assert f"{entry.values[metric]:.3f}"[1:] in words, metric
            assert f"[{low:.3f},{high:.3f}]".replace("0.", ".") in words
    searched = [line for line in text.splitlines() if ".00568" in line]
    assert searched
    for line in searched:
        assert [cell for cell in line.split() if cell not in "012"][-5:] == [".0658", "no", ".893", "10", "fusion"]


def test_a_wide_terminal_has_one_table_and_a_narrow_one_two() -> None:
    axes = OBJECTIVES[:3]
    heads = [
        [line for line in shown(front_table(front(TRIALS, axes), TRIALS, axes), width) if "trial" in line.split()]
        for width in (200, 100)
    ]
    assert [len(lines) for lines in heads] == [1, 2]
    assert heads[0][0].split() == [*heads[1][0].split(), *heads[1][1].split()[2:]]


def test_of_a_large_front_some_rows_stand_for_all() -> None:
    axes = OBJECTIVES[:2]
    runs = [manifest(number, [0.001 * number, 0.5 - 0.001 * number]) for number in range(400)]
    lines = shown(front_table(front(runs, axes), runs, axes), 200)
    assert sum(line.startswith("*t") for line in lines) == 150
    assert any(line.startswith("and 250 more on the front; ") for line in lines)
    assert lines[2].split()[0] == "*t00399", "the best in the first objective"
    few = shown(front_table(front(runs[:150], axes), runs[:150], axes), 200)
    assert sum(line.startswith("*t") for line in few) == 150
    assert "more on the front" not in " ".join(few)


def test_recipes_stand_below_the_front_once_whatever_their_replicates() -> None:
    axes = OBJECTIVES[:3]
    runs = [*TRIALS, manifest(8, [0.5, 0.5, 0.05], recipe="mat", key="my-study-t00001-s1", replicate=1)]
    runs += [manifest(9, [0.662, 0.581, 0.105], recipe="tecoa_itr", key="my-study-t00000-s1", replicate=1)]
    lines = shown(front_table(front(runs, axes), runs, axes), 200)
    recipes = [line for line in lines if "MAT " in line or "TeCoA-ITR" in line]
    assert [line.split()[:2] for line in recipes] == [["*t00000", "TeCoA-ITR"], ["t00001", "MAT"]]
    assert re.search(r"12 s x1\.0 +1 +\.05 +no +0 +- +0", recipes[1]), "a recipe outside the space shows its knobs, too"


def test_a_trial_that_went_on_trained_all_its_steps() -> None:
    whole = {"steps": 40, "seconds": {"train": 2.0, "attack": 4.0}}
    runs = [
        manifest(0, [0.9], cost=whole),
        manifest(1, [0.9], cost={**whole, "resumed_from_steps": [10, 30]}),
        manifest(2, [0.9], cost={**whole, "resumed_from_steps": [40]}),
    ]
    assert _training_costs(runs) == {runs[0].key: "6 s", runs[1].key: "24 s"}


def test_a_cost_has_no_interval() -> None:
    axes = (OBJECTIVES[0], Objective(metric="cost/device_seconds", direction="minimize", low=0, high=100))
    table = "\n".join(shown(front_table(front(TRIALS, axes), TRIALS, axes), 200))
    assert re.search(r"\.800 \[\.750,\.840\] 12 ", table)


def display(width: int | None = None, planned: Any = lambda: 12, **space: Any) -> Display:
    console = Console(width=width or 200, highlight=False, force_terminal=width is not None, no_color=True)

    def settings(record: TrialRecord) -> dict[str, Any]:
        return {**Point().model_dump(mode="json"), **record.params}

    return Display("study s", OBJECTIVES[:3], tuple(space.get("space", JOINT)), settings, planned, console)


def record(number: int, recipe: str | None = None) -> TrialRecord:
    return TrialRecord(number, f"s-t{number:05d}-s0", "running", {} if recipe else dict(PARAMS), recipe)


RUNG = Event(time=1, event="rung", step=14, metrics={"clean/mr_r5": 0.99, "both/mr_r5": 0.387})
FINAL = Event(time=2, event="final", step=42, metrics={"clean/mr_r5": 0.8, "both/mr_r5": 0.1})


@pytest.mark.parametrize(("width", "knobs"), [(60, False), (80, True), (100, True), (200, True)])
def test_the_live_table_marks_rungs_and_shows_knobs_where_there_is_room(width: int, knobs: bool) -> None:
    live = display(width)
    live._live = object()
    live.changed(record(2), Event(time=0, event="start"))
    live.changed(record(2), RUNG)
    live.changed(record(3), RUNG)
    live.changed(record(3), FINAL)
    live.changed(record(3), manifest(3, [0.8, 0.5, 0.1]))
    live.changed(record(4), manifest(4, [], state="stopped", rungs={14: {"clean/mr_r5": 0.2}}, reason="behind " * 20))
    lines = shown(live._table(), width)
    assert all(len(line) <= width for line in lines)
    rows = {line.split()[0]: line.split() for line in lines if line.strip().startswith("t0000")}
    assert rows["t00002"][:5] == ["t00002", "step", "14", "~.990", "~.387"]
    assert rows["t00003"][:5] == ["t00003", "complete", ".800", ".500", ".100"]
    assert rows["t00004"][:3] == ["t00004", "stopped", "~.200"]
    assert list(rows) == ["t00003", "t00004", "t00002"], "those that run come last"
    assert (rows["t00003"][-6:] == [".00568", ".0658", "no", ".893", "10", "1"]) == knobs
    legend = " ".join(" ".join(lines).split())
    assert "~ at a rung: fewer images and a weaker attack" in legend
    assert ("tau: temperature" in legend) == knobs


def test_lines_tell_rungs_from_final_values_and_count_replicates(capsys: pytest.CaptureFixture[str]) -> None:
    total = [2]
    lines = Display("s", OBJECTIVES[:3], (), lambda _: {}, lambda: total[0], terminal())
    lines.changed(record(2), RUNG)
    lines.changed(record(2), FINAL)
    lines.changed(record(2), manifest(2, [0.8, 0.5, 0.1]))
    total[0] = 4  # the ledger plans replicates when the last searched trial has ended
    lines.changed(record(3), manifest(3, [0.8, 0.5, 0.1]))
    for number in (4, 5):
        lines.changed(record(number), manifest(number, [0.8, 0.5, 0.1]))
    told = capsys.readouterr().out.splitlines()
    assert "rung at step 14  clean/mr_r5=~.990 both/mr_r5=~.387" in told[0]
    assert "complete  clean/mr_r5=.800 image/mr_r5=.500 both/mr_r5=.100  [1/2, about" in told[1]
    assert [re.findall(r"\[(\d/\d)", line) for line in told[2:]] == [["2/4"], ["3/4"], ["4/4"]]


def test_the_width_of_a_pipe_is_what_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert terminal().width == 100
    monkeypatch.delenv("COLUMNS")
    assert terminal().width == 180


def test_knobs_of_other_spaces_are_shown() -> None:
    live = display(100, space=FUSION)
    live._live = object()
    live.changed(record(2), RUNG)
    assert shown(live._table(), 100)[3].split()[-7:] == [".00568", ".0658", "no", ".893", "10", "1", "fusion"]


def test_an_attempt_that_others_ended_leaves_its_trial_waiting() -> None:
    shown = display()
    record = TrialRecord(3, "s-t00003-s0", "running", {}, None)
    for ended, cause in ((None, None), (731.0, "preempted"), (None, None), (2000.0, "complete")):
        attempt = Attempt(began=1.0, ended=ended, devices=1, cause=cause, to_step=8)
        with shown._console.capture() as capture:
            shown.changed(record, Event(time=1, event="attempt", attempt=attempt))
        told = "preempted after 12 min at step 8" if cause == "preempted" else ""
        assert capture.get().strip().endswith(told)
        assert bool(capture.get()) == bool(told), "where it goes on from, or how the trial ended, comes next"
        assert shown._rows[3].state == ("waiting" if cause == "preempted" else "started")
