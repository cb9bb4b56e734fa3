"""A way to answer that is quickly opened in another process: twice the pixels."""

import os
from collections.abc import Callable

import numpy as np

from fewshot_rt.errors import ConfigError


def make_double() -> Callable[[np.ndarray], np.ndarray]:
    """Open it."""
    return double


def double(pixels: np.ndarray) -> np.ndarray:
    """Answer; above 1 it refuses, below -1 its process ends."""
    if pixels.max() > 1:
        raise ConfigError("pixels are at most 1.")
    if pixels.min() < -1:
        os._exit(3)
    return pixels * np.float32(2)
