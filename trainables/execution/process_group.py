"""PyTorch's process group for Ray Train, without PyTorch in the processes that only wait for workers.

Of each trial there are two on the head of a cluster, and Ray's own `TorchConfig` would have both import PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.util import get_node_ip_address

LEAVE_SECONDS = 30.0
"""For workers to leave their group, before they are ended."""

GROUP_SECONDS = 1800
"""For an operation of the group."""


@dataclass
class ProcessGroup(BackendConfig):
    """What Ray Train's `backend_config` says.

    Attributes:
        backend: of `torch.distributed`, nccl or gloo.
    """

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        """Asked by Ray Train."""
        return Group

    @property
    def train_func_context(self) -> Callable[[], Any]:
        """Around the loop of each worker."""
        return _on_its_device

    def to_dict(self) -> dict[str, Any]:
        """For Ray's own records."""
        return {"backend": self.backend}


class Group(Backend):
    """As Ray's `_TorchBackend`, whose functions the workers run."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Called in the controller."""
        import ray

        assert isinstance(backend_config, ProcessGroup)
        size, first = len(worker_group), worker_group.execute_single(0, get_address_and_port)
        joined = [
            worker_group.execute_single_async(rank, _join, backend_config.backend, rank, size, *first)
            for rank in range(size)
        ]
        ray.get(joined)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Called in the controller."""
        import ray

        with suppress(ray.exceptions.GetTimeoutError):
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=LEAVE_SECONDS)


def _join(backend: str, rank: int, size: int, address: str, port: int) -> None:
    from ray.train.torch import config

    meet_by_network_of_ray()
    os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": str(port)})
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, size, "env://", GROUP_SECONDS)


def meet_by_network_of_ray() -> None:
    """Have gloo use the interface with this node's address, unless GLOO_SOCKET_IFNAME names another.

    By itself it takes that of the machine's name, which Debian and Ubuntu set to 127.0.1.1: no other node gets there.
    """
    address = get_node_ip_address()
    for name, known in psutil.net_if_addrs().items():
        if any(one.address == address for one in known):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _leave(whole: bool) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=whole)


@contextmanager
def _on_its_device() -> Iterator[None]:
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield
