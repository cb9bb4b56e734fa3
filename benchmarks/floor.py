"""The physical floor of a latency: the arithmetic over what this machine reaches, and the bytes."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewshot_rt.base import Base
from fewshot_rt.predictor import Predictor

MATRIX = 1024  # rows and columns of the measured product
COPY_BYTES = 1 << 28  # larger than caches
REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What one call of a predictor, a full batch, cannot be faster than.

    flops: of all roles and steps. weight_bytes: read at least once in each step. The rates are
    measured: fp32 matrix product, and copy (read and write).
    """

    flops: int
    weight_bytes: int
    flops_per_second: float
    bytes_per_second: float

    @property
    def arithmetic_ms(self) -> float:
        """Give FLOPs over peak."""
        return 1000 * self.flops / self.flops_per_second

    @property
    def traffic_ms(self) -> float:
        """Give bytes over bandwidth."""
        return 1000 * self.weight_bytes / self.bytes_per_second

    @property
    def floor_ms(self) -> float:
        """Give the greater of both: a machine may do them at the same time."""
        return max(self.arithmetic_ms, self.traffic_ms)

    def to_dict(self) -> dict[str, float]:
        """Give the fields and the three times as JSON values."""
        times = {name: getattr(self, name) for name in ("arithmetic_ms", "traffic_ms", "floor_ms")}
        return asdict(self) | times


def find_floor(base: Base, predictor: Predictor) -> Floor:
    """Count the work of an eager predictor over a base, and measure this machine's rates."""
    return Floor(
        flops=count_flops(predictor),
        weight_bytes=count_bytes(base, steps=predictor.recipe.steps),
        flops_per_second=measure_product(base.device),
        bytes_per_second=measure_copy(base.device),
    )


def count_flops(predictor: Predictor) -> int:
    """Count the floating-point operations of one full batch; a multiply-add is two.

    What is made of weights alone does not count: it can be made once for all calls. The predictor
    must be an eager one: what other engines do is not seen.
    """
    once, twice = (_flops_of(predictor, times * predictor.recipe.batch) for times in (1, 2))
    return twice - once


def _flops_of(predictor: Predictor, batch: int) -> int:
    images = np.zeros((batch, 3, *predictor.recipe.size), np.float32)
    counter = FlopCounterMode(display=False)
    # The CPU's fused attention is unknown to the counter; products and softmax are known.
    with sdpa_kernel(SDPBackend.MATH), counter:
        predictor.with_recipe(batch=batch).answer(images)
    return int(counter.get_total_flops())


def count_bytes(base: Base, *, steps: int) -> int:
    """Give the bytes of weights that a call must read: the denoiser's in each step, others once."""
    denoiser = base.denoiser()
    others = [m for m in vars(base).values() if isinstance(m, nn.Module) and m is not denoiser]
    return steps * _bytes(denoiser) + sum(_bytes(module) for module in others)


def measure_product(device: torch.device) -> float:
    """Measure FLOP/s of an fp32 matrix product, the best of a few: a peak, not a typical value."""
    a, b = torch.randn(2, MATRIX, MATRIX, device=device)
    return 2 * MATRIX**3 / _fastest(lambda: a @ b, device)


def measure_copy(device: torch.device) -> float:
    """Measure bytes/s of a copy, read and write, the best of a few."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * COPY_BYTES / _fastest(lambda: target.copy_(source), device)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
