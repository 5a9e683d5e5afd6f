"""Two trees are compared on what exists in both."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import before
from benchmarks.synthetic import coco_set
from trainables.config import DataConfig
from trainables.data import load_dataset


def test_the_synthetic_set_is_one_that_can_be_trained_on(tmp_path: Path) -> None:
    coco_set(tmp_path / "coco", 48)
    data = load_dataset(DataConfig(root=tmp_path / "coco", image_pixels=16), tmp_path / "cache")
    assert (len(data.train.image_ids), len(data.evaluation.image_ids)) == (44, 2)
    assert len(data.train.captions) == 5 * 44
    assert re.fullmatch(r"A \w+ \w+ with the \w+ \w+ on a \w+ \w+\.", data.train.captions[0])
    assert len(set(data.train.captions)) == 5 * 44


def test_every_workload_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", before.time.perf_counter)  # set back afterwards
    before.make_data(tmp_path, before.TINY)
    for measure in before.WORKLOADS.values():
        found = measure(tmp_path, tmp_path / "cache", before.TINY)
        assert found
        assert all(0 < seconds < 60 for seconds in found.values()), found


def test_a_tree_is_compared_with_a_revision(capsys: pytest.CaptureFixture[str]) -> None:
    assert before.main(["HEAD", "--workload", "start", "--tiny"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[-3:] == ["before", "now", "ratio"]
    match = re.fullmatch(r"(.+?) +([\d.]+) +([\d.]+) +([\d.]+)x", row)
    assert match is not None, row
    name, old, new, ratio = match.groups()
    assert name == "start on 300 records"
    assert float(ratio) == pytest.approx(float(old) / float(new), abs=0.06)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["no-such-tag"], "error: revision 'no-such-tag': fatal: not a valid object name: no-such-tag; a commit,"),
        (["HEAD", "--rounds", "0"], "error: --rounds 0: at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert before.main(flags) == 2
    said = capsys.readouterr()
    assert said.err.startswith(message)
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_git_keeps_nothing_of_an_unpacked_tree() -> None:
    with before.unpacked("HEAD") as tree:
        assert (tree / "trainables" / "trial.py").exists()
        trees = subprocess.run(["git", "worktree", "list"], cwd=before.ROOT, capture_output=True, text=True, check=True)
        assert str(tree) not in trees.stdout
