"""What a cluster may become, as the configuration of its autoscaler says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from study.execution.cluster import Growth, growth, growth_in
from trainables.config import WorkersConfig

ROOT = Path(__file__).parents[3]
GPU = WorkersConfig(gpus_per_worker=1)


def test_the_cluster_of_the_repository() -> None:
    text = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    found = growth_in(ROOT / "cluster.yaml")
    assert found is not None
    types = text["available_node_types"]
    assert found.head == types[text["head_node_type"]]["resources"]
    assert found.side_by_side(GPU) == found.of("GPU") <= text["max_workers"] * 8
    assert found.side_by_side(GPU) > 0


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (GPU, 3 * 4 + 2),  # five nodes in all: first those that hold most
        (WorkersConfig(gpus_per_worker=0.5), 2 * (3 * 4 + 2)),
        (WorkersConfig(count=8, gpus_per_worker=1), 1),
        (WorkersConfig(count=16, gpus_per_worker=1), 0),
        (WorkersConfig(cpus_per_worker=8, gpus_per_worker=1), 5),  # cores are what there is too little of
        (WorkersConfig(cpus_per_worker=10, gpus_per_worker=0), 1 + 5),  # the head is a node, too
        (WorkersConfig(cpus_per_worker=11, gpus_per_worker=0), 1),
    ],
)
def test_trials_side_by_side(workers: WorkersConfig, expected: int) -> None:
    found = Growth({"CPU": 9}, (({"CPU": 8, "GPU": 1}, 10), ({"CPU": 8, "GPU": 4}, 3)), nodes=5)
    assert found.side_by_side(workers) == expected


HEAD: dict[str, Any] = {"resources": {"CPU": 2}, "max_workers": 0}


@pytest.mark.parametrize(
    "types",
    [
        {"head": HEAD, "gpu": {"max_workers": 3}},  # Ray would find out; nobody has yet
        {"gpu": {"resources": {"GPU": 1}}},
        {"head": {"resources": {}, "max_workers": 2}},  # as Ray has own machines, with the workers among them
        None,
    ],
)
def test_what_does_not_say_is_not_guessed(tmp_path: Path, types: Any) -> None:
    path = tmp_path / "cluster.yaml"
    assert growth_in(path) is None
    path.write_text(yaml.safe_dump({"head_node_type": "head", "max_workers": 3, "available_node_types": types}))
    assert growth_in(path) is None


@pytest.fixture
def autoscaler(tmp_path: Path) -> Iterator[Path]:
    """A process that was started like Ray's."""
    path = tmp_path / "bootstrap.yaml"
    types = {"head": HEAD, "gpu": {"resources": {"CPU": 4, "GPU": 1}}}
    path.write_text(yaml.safe_dump({"head_node_type": "head", "max_workers": 3, "available_node_types": types}))
    flags = ["--gcs-address=192.0.2.1:6379", f"--autoscaling-config={path}", "--logs-dir=/tmp"]
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()", *flags], stdin=subprocess.PIPE)
    yield path
    process.communicate()


@pytest.mark.usefixtures("autoscaler")
def test_the_autoscaler_of_this_head_is_asked_and_no_other() -> None:
    found = growth("192.0.2.1:6379")
    assert found is not None
    assert (found.nodes, found.side_by_side(GPU)) == (3, 3)
    assert growth("192.0.2.1:6380") is None
