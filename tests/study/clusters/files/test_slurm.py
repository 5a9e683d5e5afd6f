"""The batch script, on a real Slurm of two nodes that this machine plays."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from study import cluster
from tests.chaos.test_kill_and_resume import CONFIG
from tests.study.clusters.files.slurm_server import Slurm, missing
from trainables.errors import InputError

ROOT = Path(__file__).resolve().parents[4]

STAND_IN = """#!/usr/bin/env python3
'''Stands in for ray and for python -m study.run: they take minutes. Another test has the real ones.'''
import json, os, pathlib, signal, sys, time
name, given = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
if given[:1] == ["health-check"]:
    sys.exit(not list(pathlib.Path().glob("head-*")))
run = int(os.environ.get("SLURM_RESTART_COUNT", 0))
kind = "head" if "--head" in given else "worker" if name == "ray" else "study"
pathlib.Path(f"{kind}-{run}.json").write_text(json.dumps([given, dict(os.environ)]))
if name == "python" and pathlib.Path("exit").exists():
    sys.exit(int(pathlib.Path("exit").read_text()))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75 if name == "python" else 1))
time.sleep(120)
"""


def script(shared: Path, folder: Path) -> Path:
    """As a user writes it and edits it for two nodes with a core, and a study that draws its own images."""
    flags = ["--shared", str(shared), "--cache", str(shared / "cache"), "--nodes", "2", "--cpus", "1", "--gpus", "0"]
    text = cluster.text(cluster.parse(["--provider", "slurm", *flags, "--preset", "quickstart"]))
    made = folder / "paretovl.sbatch"
    made.write_text(text.replace(f" --data.root {shared}/data", ""))
    return made


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if lacking := missing():
        pytest.skip(f"Slurm is not installed: there is no {', '.join(lacking)}; Debian has slurmctld, slurmd, munge")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as root:
        made = Slurm(Path(root))
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder with stand-ins."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("ray", "python"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    script(tmp_path / "shared", tmp_path)
    return tmp_path


def begun(project: Path, kind: str, run: int) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a stand-in, in the job's first run or after it was queued again so often."""
    found = json.loads((project / f"{kind}-{run}.json").read_text())
    return found[0], found[1]


def running(slurm: Slurm, project: Path, run: int) -> None:
    """Wait until everything of a run has begun."""
    slurm.until(lambda: all((project / f"{kind}-{run}.json").exists() for kind in ("head", "worker", "study")), 60)


def test_a_job_has_a_cluster_of_its_own_and_queues_itself_again(slurm: Slurm, project: Path) -> None:
    job = slurm.submit(f"--chdir={project}", project / "paretovl.sbatch", "--seed", "3")
    running(slurm, project, 0)
    (head, there), (worker, _), (study, told) = (begun(project, kind, 0) for kind in ("head", "worker", "study"))
    address = told["PARETOVL_CLUSTER__ADDRESS"]
    assert f"--address={address}" in worker
    assert address.rpartition(":")[2] == f"{20000 + int(job) % 10000}"
    assert f"--port={address.rpartition(':')[2]}" in head
    assert f"--temp-dir=/tmp/ray-{job}" in head
    assert '--resources={"trial_driver": 64}' in head
    assert "--num-cpus=1" in head
    assert study == ["-m", "study.run", "--preset", "quickstart", "--seed", "3"]
    assert told["PARETOVL_STUDIES_DIR"] == f"{project}/shared/studies"
    tokens = {begun(project, kind, 0)[1]["RAY_AUTH_TOKEN"] for kind in ("head", "worker", "study")}
    assert there["RAY_AUTH_MODE"] == "token"
    assert [len(token) for token in tokens] == [64]

    slurm.run("scancel", "--signal=USR1", "--batch", job)  # what Slurm does before the time limit
    running(slurm, project, 1)
    assert begun(project, "study", 1)[0] == study
    assert begun(project, "head", 1)[1]["RAY_AUTH_TOKEN"] not in tokens

    other = slurm.submit("--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    slurm.until(lambda: slurm.state(other)["JobState"] == "COMPLETED", 60)
    running(slurm, project, 2)
    assert slurm.state(job)["Restarts"] == "2", "once each"

    slurm.run("scancel", job)
    slurm.until(lambda: slurm.state(job)["JobState"] == "CANCELLED", 60)
    said = (project / f"paretovl-{job}.log").read_text()
    assert said.count("stopping the study after SIGUSR1") == 1
    assert said.count("stopping the study after SIGTERM") == 2


@pytest.mark.chaos
def test_a_preempted_study_goes_on_and_ends(slurm: Slurm, long_chaos: bool, tmp_path: Path) -> None:
    if not long_chaos:
        pytest.skip("starts Ray four times; --long-chaos")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    trials = tmp_path / "shared" / "studies" / "quickstart" / "trials"
    job = slurm.submit(f"--chdir={tmp_path}", script(tmp_path / "shared", tmp_path), "--config", "config.yaml")
    slurm.until(lambda: any('"rung"' in log.read_text() for log in trials.glob("*/events.jsonl")), 300)
    slurm.submit("--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    slurm.until(lambda: slurm.state(job)["JobState"] == "COMPLETED", 400)
    assert slurm.state(job)["Restarts"] == "1"
    said = (tmp_path / f"paretovl-{job}.log").read_text()
    assert "stopping the study after SIGTERM" in said
    assert "interrupted after" in said
    assert "study quickstart is done: 4 trials" in said
    completed = re.findall(r"(\S+)  \w+  complete  ", said)
    assert sorted(completed) == sorted(manifest.parent.name for manifest in trials.glob("*/manifest.json"))
    assert len(set(completed)) == len(completed) == 4
    assert not Path(f"/tmp/ray-{job}").exists()


@pytest.mark.parametrize(("code", "state"), [(0, "COMPLETED"), (2, "FAILED")])
def test_a_study_that_is_done_or_refused_ends_the_job(slurm: Slurm, project: Path, code: int, state: str) -> None:
    (project / "exit").write_text(str(code))
    job = slurm.submit(f"--chdir={project}", project / "paretovl.sbatch")
    slurm.until(lambda: slurm.state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 60)
    found = slurm.state(job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == (state, f"{code}:0", "0")


@pytest.mark.parametrize("flags", [[], ["--nodes", "4", "--gpus", "8", "--partition", "long", "--hours", "1.5"]])
def test_the_script_is_shell_and_asks_for_what_was_said(flags: list[str]) -> None:
    text = cluster.text(cluster.parse(["--provider", "slurm", *flags]))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line)
    assert (asked["signal"], asked["open-mode"], asked["requeue"]) == ("B:USR1@120", "append", "")
    if flags:
        assert [asked[name] for name in ("nodes", "gpus-per-node", "partition", "time")] == [
            "4",
            "8",
            "long",
            "1:30:00",
        ]
    else:
        assert (asked["time"], "partition" in asked) == ("12:00:00", False)
        assert text.count("# FILL-IN: ") == 1
    assert not [line for line in text.splitlines() if len(line) > 120]


def test_mistakes_are_told_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)2 mistakes.*cpus.*hours"):
        cluster.parse(["--provider", "slurm", "--cpus", "0", "--hours", "0"])
