"""When a worker writes a checkpoint between the ends of its epochs."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.context import TrainContext
from ray.train.v2._internal.execution.preemption import PreemptionContext

from trainables.execution.worker import Asked, TooLong
from trainables.training.agreement import Agreement


def test_a_checkpoint_is_due_by_the_first_workers_clock_or_as_a_node_goes() -> None:
    now, goes = [0.0], [False]
    alone = Agreement(torch.device("cpu"))
    first = Asked(alone, 10, lambda: goes[0], lambda: None, clock=lambda: now[0])
    other = Asked(alone, None, lambda: goes[0], lambda: None, clock=lambda: now[0])
    answers = []
    for now[0] in (9, 10, 11, 12):
        answers.append((first(), other()))
        if now[0] == 11:
            first.written()
    assert answers == [(False, False), (True, False), (True, False), (False, False)]
    goes[0] = True
    assert first()
    assert first.preempted
    late = Asked(alone, 10, lambda: True, lambda: "too long", clock=lambda: now[0])
    with pytest.raises(TooLong, match="too long"):
        late()


def test_ray_tells_a_worker_that_its_node_goes_where_it_is_looked_for() -> None:
    assert "preemption_context" in {field.name for field in dataclasses.fields(TrainContext)}
    assert PreemptionContext().preemption_info is None


def agreeing(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    agree = Agreement(torch.device("cpu"))
    answers = [agree(rank == 1 and step == 2, rank == 0 and step == 3) for step in range(5)]
    start = time.perf_counter()
    for _ in range(200):
        agree(False, False, False)
    torch.save((answers, (time.perf_counter() - start) / 200), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_answer_alike_at_no_cost(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainables.training.finetune"])
    processes = [context.Process(target=agreeing, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for answers, seconds in found:
        assert answers == [[False, False], [False, False], [True, False], [False, True], [False, False]]
        print(f"{1e6 * seconds:.0f} us a step")
        assert seconds < 0.05, "of a step; far less on a machine that does nothing else"
