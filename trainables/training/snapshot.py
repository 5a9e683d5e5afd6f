"""What a trial goes on from in the middle of training: copied at once, written while training goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainables.training.objective import Trainee
from trainables.training.sharding import full_state, load_full_state

WEIGHTS, OPTIMISER = "model.safetensors", "optimiser.pt"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Weights and optimiser state of one step, on the host. Learning rate and random numbers are functions of the step.

    Attributes:
        weights: by name.
        optimiser: by parameter names.
        copied: an event on the device after which they are all there; None if they are.
    """

    weights: dict[str, Any]
    optimiser: dict[str, Any]
    copied: torch.cuda.Event | None

    @classmethod
    def take(cls, trainee: Trainee, optimiser: torch.optim.Optimizer) -> Snapshot:
        """Of this moment, whatever the next steps do. All workers call this together; only the first's has content."""
        weights, state = full_state(trainee, optimiser)
        on_gpu = trainee.log_temperature.is_cuda
        return cls(_on_host(weights), _on_host(state), torch.cuda.current_stream().record_event() if on_gpu else None)

    def write(self, folder: Path) -> None:
        """Into an empty folder, from any thread."""
        if self.copied is not None:
            self.copied.synchronize()
        save_file(self.weights, folder / WEIGHTS)
        torch.save(self.optimiser, folder / OPTIMISER)


def restore(trainee: Trainee, optimiser: torch.optim.Optimizer, folder: Path) -> None:
    """What `Snapshot.write` wrote; any number of workers, all of them together."""
    state = torch.load(folder / OPTIMISER, map_location="cpu", weights_only=True)
    load_full_state(trainee, optimiser, load_file(folder / WEIGHTS), state)


def _on_host(value: Any) -> Any:
    """A copy of all tensors in it; of those on a GPU into pinned memory, which does not wait for the device."""
    if isinstance(value, Tensor):
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return host.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {name: _on_host(part) for name, part in value.items()}
    return [_on_host(part) for part in value] if isinstance(value, list) else value
