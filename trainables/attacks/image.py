"""Projected gradient descent on pixels, with randomness that belongs to the sample and not to the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(value: Tensor) -> Tensor:
    """A bijection of 32-bit words held in int64 that scatters neighbouring inputs (Wellons' lowbias32)."""
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _WORD
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _WORD
    return value ^ (value >> 16)


def sample_keys(seed: int, epoch: int, image_ids: Tensor) -> Tensor:
    """One 32-bit key a sample, int64 (batch,), from (seed, epoch, image id) alone."""
    key = _mix(torch.full_like(image_ids, seed & _WORD) + 0x9E3779B9 & _WORD)
    key = _mix((key + epoch * 0x85EBCA6B) & _WORD)
    return _mix((key ^ image_ids & _WORD) & _WORD)


def uniform_noise(keys: Tensor, like: Tensor) -> Tensor:
    """Noise in [-1, 1) shaped and placed like `like` (batch, ...); row i depends on keys[i] only.

    A counter-based generator: the same on every device and for every batch, without a generator's state.
    """
    counter = torch.arange(like[0].numel(), device=like.device, dtype=torch.int64) * 0x9E3779B9
    bits = _mix((keys.to(like.device)[:, None] + counter) & _WORD)
    return (bits.to(torch.float32) / 2**31 - 1).clamp(-1, 1).view_as(like)


def pgd(
    pixels: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    epsilon: float,
    steps: int,
    keys: Tensor,
) -> Tensor:
    """Raise `objective` within an L-infinity ball (Madry et al. 2018), from a uniform random start.

    The step is 1.25 epsilon / steps: one step is FGSM-RS (Wong et al. 2020), ten are Co-Attack's (Zhang et al. 2022).
    Only the gradient with respect to the pixels is computed; the caller puts the model in eval mode.

    Args:
        pixels: float (batch, 3, height, width) in [0, 1].
        objective: maps such pixels to one value a sample, (batch,); rows must not depend on each other.
        epsilon: radius in [0, 1] pixels.
        steps: gradient steps, at least 1.
        keys: int64 (batch,), see `sample_keys`.

    Returns:
        Adversarial pixels, within epsilon of `pixels` and in [0, 1].
    """
    low, high = (pixels - epsilon).clamp_(min=0), (pixels + epsilon).clamp_(max=1)
    step = 1.25 * epsilon / steps
    adversarial = torch.clamp(pixels + epsilon * uniform_noise(keys, pixels), low, high)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(adversarial).sum(), adversarial)
        adversarial = torch.clamp(adversarial.detach() + step * gradient.sign(), low, high)
    return adversarial
