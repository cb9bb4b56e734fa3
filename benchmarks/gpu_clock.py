"""How long work takes on a GPU, and how much arithmetic the GPU does at most."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewshot_rt.export.cuda_graphs import CudaGraph
from fewshot_rt.export.forms import FP8_MOST

from .gpu_units import attempt
from .timing import Summary, interleave, summarise

# Rows, columns and depth of the products; on a GPU they fill it.
LARGE = ((8192, 8192, 8192), (16384, 8192, 8192), (8192, 16384, 4096))
SMALL = ((64, 64, 64),)
PRODUCT_ROUNDS = 10


def time_in_turns(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int, device: str, warmup: int = 1
) -> dict[str, Summary]:
    """Time calls in turns, on a GPU by its own events; the CPU waits for each to end."""
    clock = _events() if device == "cuda" else time.perf_counter
    samples = interleave(variants, rounds=rounds, warmup=warmup, clock=clock)
    return {name: summarise(times) for name, times in samples.items()}


def repeated(call: Callable[[], Tensor], count: int, *, device: str) -> Callable[[], Any]:
    """Give a function that calls so often; on a GPU as one graph, without gaps of launching."""

    def run(_: Sequence[Tensor] = ()) -> list[Tensor]:
        for _number in range(count - 1):
            call()
        return [call()]

    if device != "cuda":
        return run
    graph = CudaGraph(run, ())
    return lambda: graph(())


@cache
def measure_peaks(device: str, sizes: tuple[tuple[int, int, int], ...]) -> dict[str, float]:
    """Measure FLOP/s of large products of random values, of each kind those of the fastest size.

    bf16; fp8 as the engines have it, with a scale for each row and column; and fp8 whose sums are
    kept in fewer bits ("fast accumulation"). What is not to be had is left out.
    """
    peaks: dict[str, float] = {}
    for size in sizes:
        possible = {n: p for n, p in _products(device, *size).items() if attempt(p)[0] is not None}
        summaries = time_in_turns(possible, rounds=PRODUCT_ROUNDS, device=device, warmup=3)
        rows, columns, depth = size
        for name, summary in summaries.items():
            speed = 2 * rows * columns * depth / (summary.median_ms / 1000)
            peaks[name] = max(peaks.get(name, 0.0), speed)
    return peaks


def _products(device: str, rows: int, columns: int, depth: int) -> dict[str, Callable[[], Tensor]]:
    tokens = torch.randn(rows, depth, device=device, dtype=torch.bfloat16)
    weight = torch.randn(columns, depth, device=device, dtype=torch.bfloat16)
    # Normal values reach about 5; within what e4m3 holds, their size does not matter.
    small, small_weight = (
        (t * (FP8_MOST / 8)).clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)
        for t in (tokens, weight)
    )
    row_scale = torch.full((rows, 1), 8 / FP8_MOST, device=device)
    column_scale = torch.full((1, columns), 8 / FP8_MOST, device=device)

    def in_fp8(is_fast: bool) -> Tensor:
        return torch._scaled_mm(
            small,
            small_weight.t(),
            scale_a=row_scale,
            scale_b=column_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=is_fast,
        )

    return {
        "bf16": lambda: tokens @ weight.t(),
        "fp8": lambda: in_fp8(False),
        "fp8, fast accumulation": lambda: in_fp8(True),
    }


def _events() -> Callable[[], float]:
    """Make a clock of seconds that stands behind all that was started on the GPU."""
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        event.synchronize()
        return float(start.elapsed_time(event)) / 1000

    return now
