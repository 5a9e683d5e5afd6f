"""Two workers with half the batch are one worker with all of it."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainables.config import Point, TrialConfig
from trainables.evaluation.robustness import evaluate
from trainables.finetune import Clock, Trainee, original_embeddings, worker_loss
from trainables.prepare import prepare

POINTS = {
    "cross": Point(
        contrastive_weight=0.6, temperature=0.1, temperature_learned=True, epsilon=4 / 255, attack_steps=2, words=1
    ),
    "deviation": Point(
        contrastive_weight=0.3, temperature=0.1, epsilon=4 / 255, attack_steps=2, attack_objective="deviation"
    ),
}


def step(rank: int, world: int, config: TrialConfig, folder: str) -> None:
    """One forward and backward pass as worker `rank`; saves loss, gradients and a small evaluation."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    prepared = prepare(config)
    device = torch.device("cpu")
    originals = original_embeddings(prepared, device)
    trainee = Trainee(prepared.base, config.point)
    module = DistributedDataParallel(trainee) if world > 1 else trainee
    loss = worker_loss(module, trainee, config, prepared, originals, 3, Clock(device))
    loss.backward()
    ranks = evaluate(trainee.model, prepared.gallery, config.protocol, max_tokens=32, device=device).ranks
    saved = {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}
    saved["loss"] = loss.detach()
    saved |= {
        f"rank {target} {d}": torch.from_numpy(getattr(r, d)) for target, r in ranks.items() for d in ("tr", "ir")
    }
    torch.save(saved, Path(folder) / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def run_workers(world: int, config: TrialConfig, folder: Path) -> list[dict[str, torch.Tensor]]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=step, args=(rank, world, config, str(folder))) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("name", POINTS)
def test_two_workers_equal_one(name: str, tiny_trial: TrialConfig, tmp_path: Path) -> None:
    config = tiny_trial.model_copy(update={"point": POINTS[name]})
    prepare(config)
    (alone,) = run_workers(1, config, tmp_path)
    for worker in run_workers(2, config, tmp_path):
        assert worker.keys() == alone.keys()
        assert len([key for key in alone if "log_temperature" in key]) == (1 if POINTS[name].temperature_learned else 0)
        for key, value in alone.items():
            if key.startswith("rank"):
                np.testing.assert_array_equal(worker[key], value, err_msg=key)
            else:
                torch.testing.assert_close(worker[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert max(value.abs().max() for key, value in alone.items() if "model" in key) > 1e-3
