"""The patch embedding is the convolution it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trainables.models.patches import PatchEmbedding


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (19, 17)])
def test_values_and_gradients_are_those_of_the_convolution(height: int, width: int, bias: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 10, kernel_size=8, stride=8, bias=bias)
    patches = copy.deepcopy(convolution)
    patches.__class__ = PatchEmbedding
    pixels = torch.rand(2, 3, height, width, requires_grad=True)
    direction = torch.randn(2, 10, height // 8, width // 8)
    found = []
    for layer in (convolution, patches):
        embedded = layer(pixels)
        wanted = [pixels, *layer.parameters()]
        found.append([embedded, *torch.autograd.grad((embedded * direction).sum(), wanted)])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
