"""The sampler: from noise to the clean latents in a few steps, as a generator. NumPy or torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .schedule import Schedule

Array = Any  # numpy.ndarray or torch.Tensor
SOLVERS = ("euler", "dpm")


@dataclass(frozen=True)
class SampleStep:
    """Where a sampler stands after one step. Shapes: latents [B, C, F, h, w]; time in [0, 1]."""

    index: int
    time: float
    latents: Array


def sample(
    denoise: Callable[[Array, Array], Array],
    noise: Array,
    *,
    schedule: Schedule,
    steps: int,
    solver: str = "euler",
    start: float = 1.0,
    drop_after: int | None = None,
    ends: int = 1,
) -> Iterator[SampleStep]:
    """Walk from pure noise to clean latents, yielding after each step; the last one is clean.

    solver: "euler" (DDIM for "v"), or "dpm", DPM-Solver++ of the second order, which leans on the
        step before; the same with up to 3 steps, since the way from pure noise and the one to the
        clean end have no second order.
    start: the time at which the noise is taken to be; those of the schedule are scaled to it.
    drop_after: the number of steps after which only `ends` latent frames at either end are kept,
        so that later steps cost less.
    Shapes: noise [B, ...]; denoise takes latents [B, ...] and time [B] and predicts [B, ...].
    Source: Song et al. 2021 (DDIM); Lu et al. 2022 (DPM-Solver++), algorithm 2; Wu et al. 2025
    (ChronoEdit: frames dropped).
    """
    latents = noise
    times = [start * time for time in schedule.times(steps)]
    before: tuple[float, Array] | None = None
    for index, (time, next_time) in enumerate(pairwise(times)):
        batch_time = 0 * latents.reshape(latents.shape[0], -1)[:, 0] + time
        prediction = denoise(latents, batch_time)
        if solver == "euler":
            latents = schedule.step(latents, prediction, time, next_time)
        else:
            clean, _ = schedule.split(latents, prediction, time)
            ahead = _extrapolate(schedule, before, (time, clean), next_time)
            latents = schedule.towards(latents, ahead, time, next_time)
            before = (time, clean)
        if index + 1 == drop_after:
            latents = keep_ends(latents, ends)
            before = before and (before[0], keep_ends(before[1], ends))
        yield SampleStep(index, next_time, latents)


def keep_ends(latents: Array, count: int) -> Array:
    """Keep so many latent frames at either end. Shapes: [B, C, F, h, w]."""
    return latents[:, :, [*range(count), *range(-count, 0)]]


def _extrapolate(
    schedule: Schedule, before: tuple[float, Array] | None, now: tuple[float, Array], later: float
) -> Array:
    """Guess the clean sample half-way to a later time from the two last predictions of it."""
    time, clean = now
    if before is None or later == 0:
        return clean
    earlier, present, coming = (_log_ratio(schedule, t) for t in (before[0], time, later))
    if math.isinf(earlier):
        return clean
    weight = (coming - present) / (2 * (present - earlier))
    return clean + weight * (clean - before[1])


def _log_ratio(schedule: Schedule, time: float) -> float:
    """Give the logarithm of signal over noise, half of that of their powers."""
    a, b = (float(value) for value in schedule.coefficients(time))
    return math.log(a / b) if a > 0 else -math.inf
