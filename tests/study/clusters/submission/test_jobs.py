"""What is done about a study's jobs, by how they stand."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from study.clusters.submission.jobs import (
    RESULTS,
    Job,
    Plan,
    decide,
    job_id,
    jobs_of,
    results_entrypoint,
    results_in,
    study_entrypoint,
)


def job(number: int, state: str, code: int | None = None, entrypoint: str = "run", study: str = "x") -> Job:
    return Job(job_id(study, number), state, entrypoint, code)


@pytest.mark.parametrize(
    ("jobs", "plan"),
    [
        ([], Plan("paretovl-x-1", submits=True)),
        ([job(1, "PENDING")], Plan("paretovl-x-1")),
        ([job(1, "RUNNING", entrypoint="run --budget.trials 9")], Plan("paretovl-x-1", differs=True)),
        ([job(1, "SUCCEEDED", 0)], Plan("paretovl-x-1")),
        (
            [other := job(1, "SUCCEEDED", 0, "run --budget.trials 9")],
            Plan("paretovl-x-2", submits=True, ended=other, differs=True),
        ),
        ([failed := job(1, "FAILED", 75)], Plan("paretovl-x-2", submits=True, ended=failed)),
        ([job(2, "SUCCEEDED", 0), job(1, "FAILED", 2)], Plan("paretovl-x-2")),
        ([job(1, "FAILED", 75), job(10, "RUNNING"), job(9, "STOPPED")], Plan("paretovl-x-10")),
        ([stopped := job(3, "STOPPED")], Plan("paretovl-x-4", submits=True, ended=stopped)),
        ([job(1, "RUNNING", study="x-2"), Job(None, "RUNNING")], Plan("paretovl-x-1", submits=True)),
    ],
)
def test_the_plan(jobs: list[Job], plan: Plan) -> None:
    assert decide("x", jobs, "run") == plan


def test_jobs_of_a_study_are_its_own() -> None:
    named = ["paretovl-x.1-1", "paretovl-x.1-12", "paretovl-xy1-1", "paretovl-x.1-1-1", "paretovl-x.1-01", "my-x.1-1"]
    assert list(jobs_of("x.1", [Job(name, "RUNNING") for name in named])) == [1, 12]


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 75, 75),
        ("FAILED", 130, 130),
        ("STOPPED", None, 75),
        ("FAILED", None, 75),  # its node was lost
        ("FAILED", -9, 75),
    ],
)
def test_exit_codes_are_those_of_the_study(state: str, code: int | None, expected: int) -> None:
    assert job(1, state, code).exit_code == expected


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, shell=True, capture_output=True, text=True, cwd=folder, env={"HOME": str(folder)})


def test_the_command_brings_flags_variables_file_and_passwords(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"; echo "$PARETOVL_SEED $PARETOVL_STORAGE"; cat "$6"\n')
    python.chmod(0o700)
    (tmp_path / ".secret.env").write_text("PARETOVL_STORAGE='postgresql://me:h u$h@db/x'\n")
    config = "space:\n  words: {kind: choice, choices: [0, '$HOME']}\n"
    command = study_entrypoint(str(python), ["--name", "it's"], {"PARETOVL_SEED": "1 2"}, config, "~/.secret.env")
    assert "h u$h" not in command
    done = shell(command, tmp_path)
    assert done.stdout.splitlines() == [
        *("-m", "study.run", "--name", "it's", "--config", "/dev/stdin"),
        "1 2 postgresql://me:h u$h@db/x",
        *config.splitlines(),
    ], done.stderr
    assert not (tmp_path / ".secret.env").exists()
    assert shell(command, tmp_path).stdout.splitlines()[6] == "1 2 ", "without secrets it runs, too"


def test_results_come_through_a_log(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "a table"; eval echo packed > "$8"; exit ${CODE:-0}\n')
    python.chmod(0o700)
    command = results_entrypoint(str(python), "x", "/studies", None)
    done = shell(command, tmp_path)
    log = f"Running entrypoint for job: {command}\n{done.stdout}"
    assert results_in(log) == "cGFja2VkCg=="
    failed = shell(f"export CODE=2; {command}", tmp_path)
    assert (failed.returncode, results_in(failed.stdout)) == (2, None)
    assert results_in(f"{RESULTS[0]}\ncGFj") is None, "cut short"
