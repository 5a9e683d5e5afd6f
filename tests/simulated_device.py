"""A device of its own where there is none: values lie on the CPU, but no operation sees both sides.

Tensors on it say that they are on the device `meta`, which needs no driver, and hold their values. What a GPU refuses
is refused: an operation on tensors of both sides, of which only single numbers may be the host's. What a GPU waits for
is counted: whatever the host reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

DEVICE, HOST = torch.device("meta"), torch.device("cpu")

aten = torch.ops.aten
TRANSFERS = {aten._to_copy, aten.copy_}
BY_INDEX = {aten.index, aten.index_put, aten.index_put_}
"""Indices may be the host's, and are copied while it waits."""
SIZES_FROM_VALUES = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount}
"""Operations whose result is as large as values say, which the host has to learn first."""


class WrongDeviceError(RuntimeError):
    """An operation on tensors of both sides."""


class OnDevice(Tensor):
    """A tensor on the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("used outside `simulated_device`")

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), function.overloadpacket
        leaves, structure = tree_flatten((args, kwargs))
        there = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) and leaf.ndim]
        by_index = name in BY_INDEX and isinstance(args[0], OnDevice)
        if there and here and name not in TRANSFERS and not by_index:
            shapes = [[tuple(tensor.shape) for tensor in side] for side in (there, here)]
            raise WrongDeviceError(f"{function}: beside {shapes[0]} on the device there are {shapes[1]} on the host")
        on_device = bool(there) if name != aten.copy_ else isinstance(args[0], OnDevice)
        if kwargs.get("device") is not None:
            on_device = torch.device(kwargs["device"]) == DEVICE
        waits = by_index and (here or any(index.dtype == torch.bool for index in there[1:]))
        if there and (not on_device or waits or name in SIZES_FROM_VALUES or name == aten._local_scalar_dense):
            self.reads.append(str(function))
        inputs = {id(tensor.held): tensor for tensor in there}
        held = [
            leaf.held
            if isinstance(leaf, OnDevice)
            else HOST
            if isinstance(leaf, torch.device) and leaf == DEVICE
            else leaf
            for leaf in leaves
        ]
        args, kwargs = tree_unflatten(held, structure)
        result = function(*args, **kwargs)
        if not on_device:
            return result
        return tree_map_only(Tensor, lambda made: inputs[id(made)] if id(made) in inputs else OnDevice(made), result)


def _held(leaf: Any) -> Any:
    if isinstance(leaf, OnDevice):
        return leaf.held
    return HOST if isinstance(leaf, torch.device) and leaf == DEVICE else leaf


class _Functions(TorchFunctionMode):
    """For what takes a short way past operations where a tensor is on `meta` or of a subclass."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if function is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].cpu().tolist()
        return function(*args, **kwargs)


@contextmanager
def simulated_device() -> Iterator[list[str]]:
    """Within, `DEVICE` is a device with values of its own. Gives the list that grows by what the host reads of them."""
    operations, autocast = _Operations(), torch.is_autocast_enabled
    asked = patch("torch.is_autocast_enabled", lambda kind: kind != DEVICE.type and autocast(kind))
    with asked, _Functions(), operations:
        yield operations.reads
