"""Kernels compiled side by side, before one of them is started."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from triton import AsyncCompileMode


class Warmup:
    """Stands for a kernel, and compiles it where that would be started."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._kernel.warmup, grid=grid)


def compile_all(calls: Sequence[Callable[[Any], Any]], kernel: Any) -> None:
    """Compile a kernel for calls that start it; what fails is told when it is started.

    calls: each takes the kernel.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for call in calls:
            call(Warmup(kernel))
