"""The GPU benchmark runs on a CPU, small, also where most packages are missing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import DEVICE, simulated_device

from benchmarks.gpu import attacking
from benchmarks.gpu.bench import Bench
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
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


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
        assert rows["g", f"{family} step, planned for cpu"]["train_planned_s"] > 0
    assert any(row["note"] == "needs a GPU" for row in found["rows"])
    assert rows["b", "SGA, the published loop"]["ratio"] > 1
    assert {part for part, _ in rows} == set("abcdefg")
    assert all(math.isfinite(value) for part, name in rows if part in "bcd" for value in rows[part, name].values())
    learned = rows["e", "clean mean recall at 1"]["float32"]
    assert learned > 2 / 16, "more than chance, so that attacks have something to take away"
    assert rows["e", "both mean recall at 1"]["float32"] < learned


def test_without_pydantic_it_is_said_once() -> None:
    done = run((*ABSENT, "pydantic"), "--parts", "a,d")
    assert "pydantic (parts a, d)" in done.stderr
    assert "Traceback" not in done.stderr
    assert "peak of matrix products" in done.stdout
    assert done.stdout.count("ModuleNotFoundError") == 2


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
