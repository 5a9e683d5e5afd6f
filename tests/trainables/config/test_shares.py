"""What a trial holds of a machine: whole devices, or a share of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trainables.config import TinyConfig, TrialConfig, WorkersConfig
from trainables.execution.worker import set_up
from trainables.measure import run_once
from trainables.synthetic import made_up_words, random_model, synthetic, tokenizer_of


@pytest.mark.parametrize(
    ("workers", "devices", "trials"),
    [
        ({"gpus_per_worker": 1}, 8, 8),
        ({"gpus_per_worker": 0.5}, 8, 16),
        ({"gpus_per_worker": 0.4}, 2, 4),  # not five: a worker has its share of one device
        ({"gpus_per_worker": 1 / 3}, 1, 3),
        ({"count": 8, "gpus_per_worker": 1}, 8, 1),
        ({"count": 3}, 8, 2),
        ({"gpus_per_worker": 0}, 2, 2),
    ],
)
def test_trials_side_by_side(workers: dict[str, Any], devices: int, trials: int) -> None:
    assert WorkersConfig.model_validate(workers).side_by_side(devices) == trials


def test_a_machine_that_can_never_run_a_trial_is_told() -> None:
    half = WorkersConfig(gpus_per_worker=0.5)
    assert half.lacking(2, 1) is None
    assert half.lacking(2, 0) == (
        "a trial needs 1 CPUs and 0.5 GPUs, this machine has 2 and 0; lower workers.count, cpus_per_worker or "
        "gpus_per_worker"
    )
    assert WorkersConfig(count=3).lacking(2, 0) is not None


def test_workers_of_a_trial_share_no_gpu() -> None:
    with pytest.raises(
        ValidationError, match=r"count 2 with gpus_per_worker 0\.5: .* set count 1 .* or gpus_per_worker 1"
    ):
        WorkersConfig(count=2, gpus_per_worker=0.5)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        WorkersConfig(gpus_per_worker=2)


def test_a_worker_keeps_to_its_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    caps: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *cap: caps.append(cap))
    gpu = torch.device("cuda", 0)
    set_up(WorkersConfig(gpus_per_worker=0.25), gpu)
    set_up(WorkersConfig(gpus_per_worker=1), gpu)
    set_up(WorkersConfig(), gpu)
    assert caps == [(0.25, gpu)]


def test_half_a_device_costs_half(tiny_trial: TrialConfig) -> None:
    words, tiny = made_up_words(50), TinyConfig(width=32, layers=1, heads=2)
    model = random_model("clip", tiny, tiny, 32, 32, tokenizer_of(words), torch.device("cpu"))
    prepared = synthetic(model, np.zeros((16, 3, 32, 32), dtype=np.uint8), 4, words)
    config = tiny_trial.model_copy(update={"workers": WorkersConfig(gpus_per_worker=0.25)})
    result = run_once(config, prepared, torch.device("cpu"))
    assert 0.1 < result.device_seconds / sum(result.seconds.values()) < 0.6
