"""From where Ray's launcher is called. What it does with machines is tested in `tests/cluster/`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from study.clusters.submission.launcher import KNOWS_NOBODY, LONGEST_REASON, PROJECT, _reason, folder_of


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


COMMAND = "ssh -tt -i ~/.ssh/id_ed25519 -o IdentitiesOnly=yes ubuntu@10.0.0.1 bash --login -c -i 'source it' " * 4


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (f"ssh: connect to host 10.0.0.1 port 22: Connection timed out\r\n{COMMAND}", "port 22: Connection timed out"),
        (f"me@10.0.0.1: Permission denied (publickey).\n{COMMAND}\n", "me@10.0.0.1: Permission denied (publickey)."),
        (f"{COMMAND}\n", " ..."),
        ("", "it says nothing"),
    ],
)
def test_the_reason_is_that_of_ssh_and_never_the_whole_command(said: str, reason: str) -> None:
    assert _reason(said).endswith(reason)
    assert len(_reason(said)) <= LONGEST_REASON


@pytest.mark.parametrize(
    ("line", "nobody"),
    [
        ("NoCredentialsError: Unable to locate credentials", True),
        ("ProfileNotFound: The config profile (x) could not be found", True),
        ("UnauthorizedSSOTokenError: The SSO session has expired", True),
        ("ClientError: An error occurred (ExpiredToken) when calling the DescribeInstances operation: expired", True),
        ("ClientError: An error occurred (RequestLimitExceeded) when calling DescribeInstances: slow down", False),
        ("EndpointConnectionError: Could not connect to the endpoint URL", False),
    ],
)
def test_a_cloud_that_knows_nobody_here_is_no_head_that_is_away(line: str, nobody: bool) -> None:
    assert bool(re.search(KNOWS_NOBODY, f"Traceback:\nbotocore.exceptions.{line}\n", flags=re.M)) is nobody
