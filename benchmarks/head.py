"""What a running trial holds on the head of a cluster: `python -m benchmarks.head`.

A head and a node on this machine, a study of small trials that run side by side on the node. While they train, the
memory of all that Ray has started on the head is looked at: what is unique to each process, by the kind of process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

CONFIG = {
    "recipes": ["finetune", "mat"],
    "objectives": [{"metric": "clean/mr_r5"}, {"metric": "both/mr_r5"}],
    "data": {"image_pixels": 32, "shapes": {"train_images": 64, "val_images": 16, "test_images": 16}},
    "trial": {
        "model": {
            "tiny": {"width": 32, "layers": 1, "heads": 2, "patch_pixels": 8, "embedding": 32},
            "pretrain": {"epochs": 1, "batch_size": 16, "mlm_epochs": 1},
        },
        "training": {"epochs": 1000, "batch_size": 8},
        "workers": {"gpus_per_worker": 0},
    },
    "protocol": {"gallery_images": 12, "rung_gallery_images": 6, "image_steps": 1, "bootstrap_samples": 100},
}
ONCE = ("IDLE", "DashboardAgent", "RuntimeEnvAgent", "_AutoscalingCoordinatorActor")
"""Processes of the node and the cluster, however many trials run."""

SAMPLES, SECONDS = 8, 1.0
"""Of memory, and between two of them."""

HEADS_GB = (16, 32, 64, 128)
RESERVE_GB = 4.0
"""Of a head, for the system, Ray's own servers, the driver and its database."""


def main(arguments: Sequence[str]) -> int:
    """Print the tables. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2, help="that run at once")
    trials = parser.parse_args(arguments).trials
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    resources = {"num_cpus": 1, "resources": {"trial_driver": 8}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=resources)
    try:
        cluster.add_node(num_cpus=trials)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(cluster.head_node.all_processes["raylet"][0].process.pid, cluster.address, folder, trials)
    finally:
        cluster.shutdown()
    for kind, megabytes in sorted(found.items(), key=lambda row: -row[1]):
        print(f"{kind:<28} {megabytes:6.0f} MB a trial")
    each = sum(found.values())
    print(f"{'a running trial':<28} {each:6.0f} MB on the head; one that waits: none")
    for size in HEADS_GB:
        print(f"a head of {size:>3} GB: {int((size - RESERVE_GB) * 1000 / each):4} trials at once")
    return 0


def measure(raylet: int, address: str, folder: str, trials: int) -> dict[str, float]:
    """MB that are unique to the processes of a trial, by kind; medians over time.

    Args:
        raylet: process number of the head's.
        address: of the head.
        folder: for the study.
        trials: that run at once.
    """
    given = {**CONFIG, "cluster": {"address": address, "concurrency": trials}, "studies_dir": folder}
    config = Path(folder) / "config.yaml"
    config.write_text(yaml.safe_dump(given), encoding="utf-8")
    command = [sys.executable, "-m", "study.run", "--name", "head", "--config", str(config)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    samples: dict[str, list[float]] = defaultdict(list)
    try:
        while len(samples["ImplicitFunc"]) < SAMPLES:
            time.sleep(SECONDS)
            if driver.poll() is not None:
                raise SystemExit(f"the study ended with {driver.returncode}")
            logs = list(Path(folder).glob("head/trials/*/events.jsonl"))
            if sum('"event":"rung"' in log.read_text(encoding="utf-8") for log in logs) < trials:
                continue
            for kind, megabytes in held_below(raylet).items():
                samples[kind].append(megabytes / trials)
    finally:
        driver.terminate()
        driver.wait(60)
    return {kind: statistics.median(found) for kind, found in samples.items()}


def held_below(raylet: int) -> Counter[str]:
    """MB that are unique to the processes that a raylet has started for trials, by Ray's names of them."""
    found: Counter[str] = Counter()
    for process in psutil.Process(raylet).children(recursive=True):
        with suppress(psutil.Error, IndexError):
            name = process.cmdline()[0]
            kind = name.removeprefix("ray::").partition(".")[0].partition("(")[0].strip()
            if name.startswith("ray::") and kind not in ONCE:
                found[kind] += process.memory_full_info().uss / 1e6
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
