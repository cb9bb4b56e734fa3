"""How long calls take: variants take turns, and nothing but quantiles is kept."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Quantiles of the times of one variant, in milliseconds, and how many there were."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    count: int

    def to_dict(self) -> dict[str, float]:
        """Give the fields as JSON values."""
        return asdict(self)


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 2,
    lead: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time variants in turns, so that whatever slows the machine down meets all of them.

    The order moves on by one each round. The first `warmup` rounds are not kept. A variant must
    have done its work when it returns. lead: calls before each that is timed, so that it meets
    caches as its own calls leave them, and no other's threads that still wait for work. clock:
    gives seconds.

    Units: milliseconds, one for each round.
    Raises: ValueError if there is no round to keep.
    """
    if rounds < 1:
        raise ValueError(f"timing needs at least 1 round, not {rounds}")
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(lead):
                variants[name]()
            started = clock()
            variants[name]()
            elapsed_ms = 1000 * (clock() - started)
            if number >= warmup:
                samples[name].append(elapsed_ms)
    return samples


def summarise(samples_ms: Sequence[float]) -> Summary:
    """Give median, p10, p90 and count."""
    p10, median, p90 = (float(q) for q in np.quantile(samples_ms, [0.1, 0.5, 0.9]))
    return Summary(median_ms=median, p10_ms=p10, p90_ms=p90, count=len(samples_ms))
