"""What several workers of a trial share: gradients only (DDP), or gradients, weights and optimiser state (FSDP)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainables.training.objective import Trainee


def distribute(trainee: Trainee, device: torch.device, sharded: bool) -> nn.Module:
    """What a step calls in the trainee's place; the trainee itself if there is one worker.

    Args:
        trainee: on the device.
        device: of this worker.
        sharded: each worker keeps its share of weights, gradients and optimiser state between steps (Zhao et al. 2023).
            It is sharded as one: attacks and evaluations pass through its parts in different numbers on different
            workers, so weights can only be exchanged at agreed places, see `gather`.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return trainee
    if sharded:
        mesh = init_device_mesh(device.type, (world,))
        # FSDP takes no scalars; these are the models' own temperatures, which nothing trains.
        scalars = {parameter for parameter in trainee.parameters() if parameter.ndim == 0}
        fully_shard(trainee, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
        return trainee  # it is another class of module now
    # All that is trained takes part in every loss, see `freeze_idle`. Buffers never change.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `forward_sync_buffers`, its later name, is too new
        return DistributedDataParallel(
            trainee,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def gather(trainee: Trainee) -> None:
    """Have all weights here until the next backward pass or `full_state`; all workers call this together."""
    if isinstance(trainee, FSDPModule):
        trainee.unshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each worker may have a share; all workers call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def merge(trainee: Trainee) -> None:
    """End the sharding for good, once training is over: every worker has the weights, as plain parameters."""
    if not isinstance(trainee, FSDPModule):
        return
    state: dict[str, Any] = get_model_state_dict(trainee, options=StateDictOptions(full_state_dict=True))
    for prefix, module in trainee.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = state[f"{prefix}.{name}" if prefix else name]
            setattr(module, name, nn.Parameter(full, requires_grad=parameter.requires_grad))


def full_state(trainee: Trainee, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimiser state by parameter names, the same for any number of workers.

    Without sharding these are the live tensors; what was sharded is put together on the CPU. All workers call
    this together; it is empty on all but the first.
    """
    sharded = isinstance(trainee, FSDPModule)
    if not sharded and dist.is_initialized() and dist.get_rank() > 0:
        return {}, {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=sharded)
    return get_model_state_dict(trainee, options=options), get_optimizer_state_dict(trainee, optimiser, options=options)


def load_full_state(
    trainee: Trainee, optimiser: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
) -> None:
    """Take what `full_state` gave, on every worker."""
    set_model_state_dict(trainee, weights, options=StateDictOptions(full_state_dict=True))
    set_optimizer_state_dict(trainee, optimiser, state, options=StateDictOptions(full_state_dict=True))
