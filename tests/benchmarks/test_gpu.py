"""The GPU benchmark runs on a CPU, small, also where most packages are missing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from simulated_device import DEVICE, simulated_device

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attacking, training
from benchmarks.gpu.bench import Bench, Row
from trainables import measure

ROOT = Path(__file__).parents[2]
ABSENT = ("pydantic_settings", "torchattacks", "pycocotools", "threadpoolctl", "rapidfuzz", "ftfy", "ray")
WITHOUT = """
import sys
sys.modules |= dict.fromkeys({absent!r})
from benchmarks.gpu.__main__ import main
sys.exit(main({flags!r}))
"""


def run(absent: tuple[str, ...], *flags: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(absent=absent, flags=["--device", "cpu", "--tiny", *flags])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # what is this small gains nothing by more
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


def test_every_part_is_measured_on_a_bare_machine(tmp_path: Path) -> None:
    done = run(ABSENT, "--out", str(tmp_path / "gpu.json"))
    assert "not installed here: ray (parts f); pycocotools (parts f)" in done.stderr
    assert "pip install --no-index --find-links wheels ray pycocotools" in done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["torch"] == torch.__version__.split("+")[0]
    failed = [row for row in found["rows"] if row["name"] == "not all was measured"]
    assert [(row["part"], row["note"].split(":")[0]) for row in failed] == [("f", "ModuleNotFoundError")], failed
    assert done.returncode == 1
    rows = {(row["part"], row["name"]): row["values"] for row in found["rows"]}
    for family in ("clip", "albef", "blip"):
        assert {"images/s", "share_of_peak", "attack_s", "train_s", "memory_gb"} <= set(
            rows["a", f"{family} MAT step, batch 16"]
        )
        assert 0 < rows["a", f"{family} MAT step, batch 16"]["text_attack_share"] < 1
        assert rows["g", f"{family} step, planned for cpu"]["train_planned_s"] > 0
    assert any(row["note"] == "needs a GPU" for row in found["rows"])
    assert rows["b", "SGA, the published loop"]["ratio"] > 1
    assert 0 < rows["b", "PGD-10"]["s/1000_images"] < rows["b", "SGA"]["s/1000_images"]
    assert {part for part, _ in rows} == set("abcdefg")
    measured = [value for part, name in rows if part in "abcdg" for value in rows[part, name].values()]
    assert all(0 <= value < math.inf for value in measured)
    learned = rows["e", "clean mean recall at 1"]["float32"]
    assert learned > 2 / 16, "more than chance, so that attacks have something to take away"
    assert rows["e", "both mean recall at 1"]["float32"] < learned


def test_without_numpy_it_is_said_once() -> None:
    done = run((*ABSENT, "numpy", "pydantic"), "--parts", "g, a")
    assert "not installed here: numpy (parts a, g); pydantic (parts a, g)" in done.stderr
    assert "Traceback" not in done.stderr
    assert "peak of matrix products" in done.stdout
    assert "RuntimeError: needs part a before it" in done.stdout
    assert done.stdout.count("ModuleNotFoundError") == 1
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "cpu", "--out", "{}/missing/gpu.json"), "--out {}/missing/gpu.json: No such file or directory"),
        (("--device", "cpu", "--out", "{}"), "--out {}: Is a directory"),
        (("--parts", "a,z"), "--parts 'a,z': no part 'z'; there are a, b, c, d, e, g, f"),
        (("--device", "cuda"), "--device cuda: torch"),
        ((), "--device cpu --tiny"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    flags: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(size: int, device: str) -> None:
        if device == "cuda":
            raise RuntimeError("no driver")

    monkeypatch.setattr(torch, "zeros", broken)
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("it measures"))
    assert command.main([flag.format(tmp_path) for flag in flags]) == 2
    said = capsys.readouterr()
    assert message.format(tmp_path) in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_a_part_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(bench: Bench) -> Iterator[Row]:
        yield Row("a", "first")
        try:
            time.sleep(20)
        except TimeoutError:  # as a library may
            time.sleep(20)
        yield Row("a", "never")

    assert sum(seconds for _, seconds in command.PARTS.values()) <= 8 * 60
    monkeypatch.setattr(command, "PARTS", {"a": (endless, 0.1)})
    rows: list[Row] = []
    command.run(Bench(torch.device("cpu"), tiny=True), "a", rows.append)
    assert [row.name for row in rows] == ["first", command.FAILED]
    assert rows[1].note == "TimeoutError: cut short after 0.1 s"


def test_a_trial_without_a_checkpoint_is_ended_with_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    code = f"""
import pathlib, subprocess
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
pathlib.Path({str(pid)!r}).write_text(str(child.pid))
child.wait()
"""
    monkeypatch.setattr(training, "TRIAL", (sys.executable, "-c", code))
    monkeypatch.setattr(training, "RUN_SECONDS", 5)
    with pytest.raises(RuntimeError, match="no checkpoint after 5 s"):
        next(training.killed_trial(Bench(torch.device("cpu"), tiny=True)))
    assert not psutil.pid_exists(int(pid.read_text())) or psutil.Process(int(pid.read_text())).status() == "zombie"


def test_every_part_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    told, page = capsys.readouterr().out, (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for letter, (part, _) in command.PARTS.items():
        assert f"  {letter}  {command.line_of(part)}\n" in told
        assert f"- `{letter}`: {command.line_of(part)}\n" in page


def test_the_published_loop_runs_on_a_device() -> None:
    with simulated_device():
        bench = Bench(DEVICE, tiny=True)
        prepared = bench.prepared("clip", 2, 2)
        assert attacking.published_sga(bench, prepared.base, prepared.gallery.first(1)) > 0


def test_the_largest_batch_that_fits() -> None:
    def run(batch: int) -> str:
        if batch > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    bench = Bench(torch.device("cpu"), tiny=True)
    assert bench.largest(1024, run) == (256, "done")
    with pytest.raises(torch.OutOfMemoryError):
        bench.largest(1, lambda _: run(1000))


def test_host_syncs_are_counted_where_our_code_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with measure.host_syncs(torch.device("cuda")) as places:
        for _ in range(3):
            waits()
        evaluate()
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    line = waits.__code__.co_firstlineno + 1
    assert places == {f"tests/benchmarks/test_gpu.py:{line}": 3}


def waits() -> None:
    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


def evaluate() -> None:
    waits()
