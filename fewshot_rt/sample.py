"""The sampler: from noise to the clean latents in a few steps, as a generator. NumPy or torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .schedule import Schedule

Array = Any  # numpy.ndarray or torch.Tensor


@dataclass(frozen=True)
class SampleStep:
    """Where a sampler stands after one step. Shapes: latents [B, C, F, h, w]; time in [0, 1]."""

    index: int
    time: float
    latents: Array


def sample(
    denoise: Callable[[Array, Array], Array], noise: Array, *, schedule: Schedule, steps: int
) -> Iterator[SampleStep]:
    """Walk from pure noise to clean latents, yielding after each step; the last one is clean.

    Shapes: noise [B, ...]; denoise takes latents [B, ...] and time [B] and predicts [B, ...].
    """
    latents = noise
    times = schedule.times(steps)
    for index, (time, next_time) in enumerate(pairwise(times)):
        batch_time = 0 * latents.reshape(latents.shape[0], -1)[:, 0] + time
        latents = schedule.step(latents, denoise(latents, batch_time), time, next_time)
        yield SampleStep(index, next_time, latents)
