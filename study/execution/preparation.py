"""What all trials share is made on the cluster before the first one: data, substitutes and base model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from trainables.config import TrialConfig
from trainables.data import DataError
from trainables.errors import InputError
from trainables.execution.reserved import RESERVED_SHARE

MOST_ON_CPUS = 16
"""Processes that make substitutes together where there are no GPUs; each holds the masked language model."""


def prepare_on_cluster(template: TrialConfig, cpus: float, gpus: float, say: Callable[[str], None]) -> None:
    """Make what does not exist yet, side by side; seconds if all does.

    Substitutes are made by a process a GPU, or a CPU core, on all nodes: those of one cache share the work. Where there
    is nothing yet that could do it, it is waited for.

    Args:
        template: of the trials.
        cpus: of the cluster.
        gpus: of the cluster.
        say: told what was guessed, and when a part is ready.

    Raises:
        InputError: data or models that cannot be used.
    """
    import ray

    started = time.time()
    device = min(gpus, 1) or float(bool(template.workers.gpus_per_worker))
    options = {"num_cpus": RESERVED_SHARE, "num_gpus": device, "max_retries": 1, "scheduling_strategy": "SPREAD"}
    copies = max(1, int(gpus) or min(int(cpus), MOST_ON_CPUS))
    task, config = ray.remote(**options)(make_part), template.model_dump(mode="json")
    say("preparing data, substitutes and base model")
    if cpus < RESERVED_SHARE or gpus < device:
        say(f"waiting for devices: {{CPU: {RESERVED_SHARE:g}, GPU: {device:g}}}")
    parts = {task.remote(config, part): part for part in ("base", *["substitutes"] * copies)}
    waiting = list(parts)
    try:
        while waiting:
            (ready,), waiting = ray.wait(waiting)
            for guess in ray.get(ready):
                say(guess)
            if parts[ready] not in [parts[other] for other in waiting]:
                say(f"{parts[ready]} ready after {time.time() - started:.0f} s")
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if hasattr(error, "cause") else error
        if isinstance(cause, InputError | DataError):
            raise InputError(str(cause)) from None
        raise


def make_part(config: dict[str, Any], part: str) -> list[str]:
    """A Ray task: make one of the shared parts. Returns what had to be guessed of the base model."""
    import torch

    from trainables.attacks.registry import build_attacks
    from trainables.data.depot import sharing
    from trainables.prepare import Workshop

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    trial = TrialConfig.model_validate(config)
    build_attacks(trial.protocol)  # what is wrong with them is told now, not by every trial
    with sharing(trial.shared_cache):
        made = getattr(Workshop(trial, print), part)()
    return [f"{trial.model.base}: {guess}" for guess in made.guesses] if part == "base" else []
