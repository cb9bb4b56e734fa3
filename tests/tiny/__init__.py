"""Pipelines of real classes with random weights, in the layout of the Hub, for the tests."""

import torch
from torch import Tensor


def relative(found: Tensor, expected: Tensor) -> float:
    """Give how far one tensor is from another, relative to it."""
    return float((found - expected).norm() / expected.norm())


def draw_image(size: tuple[int, int]) -> Tensor:
    """Draw an image, always the same. Shapes: [1, 3, H, W] in [-1, 1]."""
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
