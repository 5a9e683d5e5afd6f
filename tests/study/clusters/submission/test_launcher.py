"""From where Ray's launcher is called. What it does with machines is tested in `tests/cluster/`."""

from __future__ import annotations

from pathlib import Path

import pytest

from study.clusters.submission.launcher import PROJECT, folder_of


def test_paths_of_a_file_are_looked_for_where_they_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
    (here / "data").mkdir()
    (beside / "own").touch()
    monkeypatch.chdir(here)
    file = beside / "cluster.yaml"
    assert folder_of({}, file) == here
    assert folder_of({"file_mounts": {"/a": "own"}}, file) == beside
    assert folder_of({"file_mounts": {"/a": "study", "/b": str(beside / "own")}}, file) == PROJECT
    assert folder_of({"file_mounts": {"/a": "data", "/b": "nowhere"}}, file) == here
