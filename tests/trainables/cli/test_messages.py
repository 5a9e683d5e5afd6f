"""What a command says when it cannot go on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from trainables.cli.command import exit_on_input_error, read_yaml
from trainables.errors import InputError


@pytest.mark.parametrize("file", [None, "trials.csv"])
def test_a_full_disk_is_one_line_also_where_nobody_knows_the_file(
    file: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_input_error():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {'trials.csv: ' if file else ''}No space left on device\n"


def test_a_bug_is_no_full_disk() -> None:
    with pytest.raises(OSError, match="odd"), exit_on_input_error():
        raise OSError(errno.EBADF, "odd")


@pytest.mark.parametrize(
    "line", ['storage: "postgresql://me:hunter2', "storage: [postgresql://me:hunter2", "a: b: hunter2"]
)
def test_a_file_that_is_no_yaml_is_told_by_the_place_without_what_stands_there(line: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"name: s\n{line}\n")
    with pytest.raises(InputError, match=r"study\.yaml: is no YAML: line \d, column \d+: ") as told:
        read_yaml(path)
    assert "hunter2" not in str(told.value)
