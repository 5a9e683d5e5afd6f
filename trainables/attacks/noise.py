"""Random numbers that belong to a sample: a counter-based generator without state.

The same on every device, for every batch, any number of workers, and after a resume.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(value: Tensor) -> Tensor:
    """A bijection of 32-bit words held in int64 that scatters neighbouring inputs (Wellons' lowbias32)."""
    value = value ^ (value >> 16)
    for multiplier, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
        value.mul_(multiplier).bitwise_and_(_WORD)  # in place: noise is as large as the images
        value.bitwise_xor_(value >> shift)
    return value


def sample_keys(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """One 32-bit key a sample, int64 (batch,), from (seed, epoch, sample id) alone."""
    key = _mix(torch.full_like(ids, seed & _WORD) + 0x9E3779B9 & _WORD)
    key = _mix((key + epoch * 0x85EBCA6B) & _WORD)
    return _mix((key ^ ids & _WORD) & _WORD)


def step_keys(keys: Tensor, step: int) -> Tensor:
    """Fresh keys for a step of an attack. Step 0 keeps them."""
    return keys if step == 0 else _mix((keys + step * 0xC2B2AE35) & _WORD)


def uniform(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """In [0, 1), float32 (batch, *shape); row i depends on keys[i] only."""
    counter = torch.arange(math.prod(shape), device=keys.device, dtype=torch.int64) * 0x9E3779B9
    bits = _mix((keys[:, None] + counter).bitwise_and_(_WORD)).bitwise_right_shift_(8)  # 24 bits: exact in float32
    return bits.to(torch.float32).div_(2**24).view(len(keys), *shape)


def normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal, float32 (batch, *shape), by Box and Muller (1958)."""
    size = math.prod(shape)
    radius, angle = uniform(keys, (2, -(-size // 2))).unbind(1)
    length, turn = (-2 * torch.log1p(-radius)).sqrt(), 2 * math.pi * angle
    return torch.cat([length * turn.cos(), length * turn.sin()], 1)[:, :size].view(len(keys), *shape)
