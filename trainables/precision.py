"""What is computed in which precision: bfloat16 in the models on GPUs, float32 in all that is made of their outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 forward passes on GPUs; perturbations stay float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@contextmanager
def attackable(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model under autocast, in eval mode, without gradients of parameters; afterwards it is as it was.

    Autocast keeps what it has cast only of weights that need a gradient: without, each forward pass would cast all of
    them again. So they are cast once here, to the same results.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        with autocast(device):
            if torch.is_autocast_enabled(device.type):
                replaced += _cast(model, torch.get_autocast_dtype(device.type))
            yield
    finally:
        for module, name, parameter in replaced:
            setattr(module, name, parameter)
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(training)


def _cast(model: nn.Module, kind: torch.dtype) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Put copies of that type in the place of the float32 weights that autocast casts, and give what was there.

    It casts those of linear and convolutional layers. A patch embedding keeps its own: `transformers` makes position
    embeddings of its type.
    """
    for module in model.modules():
        patches = isinstance(module, nn.Conv2d) and module.stride == module.kernel_size != (1, 1)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not patches:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dtype == torch.float32:
                    setattr(module, name, nn.Parameter(parameter.to(kind), requires_grad=False))
                    yield module, name, parameter


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices within are float32, whatever the autocast around and however GPUs round; also a
    decorator, though not of generators.

    Autocast turns the inputs of every matrix product into bfloat16, of 8 significant bits: cosines that differ by less
    than 0.4 % become equal. TF32, of 11 bits, is turned off too.
    """
    products = torch.get_float32_matmul_precision()
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(products)


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """(rows, dim) and (others, dim) -> float32 (rows, others), in full precision."""
    with full_precision():
        return rows.float() @ others.float().T
