"""What is computed in which precision: bfloat16 in the models on GPUs, float32 in all that is made of their outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 forward passes on GPUs; perturbations stay float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


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
