"""Which launches of our attention are the fastest on this GPU: what `kernels.launches` keeps.

`make gpu ARGS='--only launches'`. Nothing is tuned at run time; this says what to write there.
Axes: B batch, N heads, L tokens, D head width.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fewshot_rt.errors import EngineError
from fewshot_rt.kernels.attention import run_kernel
from fewshot_rt.kernels.declaration import HAS_TRITON, architecture_of
from fewshot_rt.kernels.launches import ARCHITECTURES, Launch, launch_for

from .gpu_attention import CUDNN, DEFAULT, OURS, Values, draw, list_calls, time_calls
from .gpu_bases import Shape, Subject
from .gpu_units import Stage, Unit
from .record import Record

KIND = "gpu-launches"
SECONDS = 60.0
# CogVideoX1.5 at 480 x 720 in 17 frames, and Wan 2.1 14B at 480 x 832 in 9.
SHAPES = (
    Shape(heads=48, width=64, length=4276, key_length=4276),
    Shape(heads=40, width=128, length=4680, key_length=4680),
)
SMALL = (Shape(heads=2, width=64, length=80, key_length=80),)
QUERY_BLOCKS, KEY_BLOCKS, WARPS, STAGES = (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
# Queries of one warp: fewer than 16 leave its matrix instruction idle, more than 32 have not the
# registers.
WARP_QUERIES = (16, 32)


def units(stage: Stage, subjects: Sequence[Subject]) -> list[Unit]:  # noqa: ARG001
    """List the head widths.

    Raises: EngineError without Triton.
    """
    if not HAS_TRITON:
        raise EngineError("section 'launches' needs the package 'triton', which is not installed.")
    return [
        Unit(
            kind=KIND,
            case=f"launches, {shape}",
            seconds=0.0 if stage.is_rehearsal else SECONDS,
            measure=partial(measure, shape, stage),
        )
        for shape in (SMALL if stage.is_rehearsal else SHAPES)
    ]


def candidates(width: int, shared_bytes: int) -> list[Launch]:
    """List launches in bf16 for heads of a width: what a program reads at once fits its memory."""
    found = []
    for queries, keys, warps, stages in product(QUERY_BLOCKS, KEY_BLOCKS, WARPS, STAGES):
        bytes_needed = 2 * width * (queries + 2 * keys * stages)
        # What is summed up stays in registers, at most half of what a thread may have.
        is_narrow = queries * width <= warps * 32 * 128
        if queries // warps in WARP_QUERIES and bytes_needed <= shared_bytes and is_narrow:
            found.append(
                Launch(
                    width_block=width,
                    query_block=queries,
                    key_block=keys,
                    warps=warps,
                    stages=stages,
                )
            )
    return found


@torch.no_grad()
def measure(shape: Shape, stage: Stage) -> Iterator[Record]:
    """Time all candidates at one size, beside the launch in use and torch's kernels.

    Raises: EngineError if torch's own choice fails, by which the others are judged.
    """
    values = draw(shape, stage.device)
    others = list_calls(values, stage)
    calls = {name: others[name] for name in (DEFAULT, CUDNN, OURS)}
    settings: dict[str, Any] = {}
    if stage.device == "cuda":
        architecture = architecture_of(values[0].device)
        launches = candidates(shape.width, ARCHITECTURES[architecture].shared_bytes)
        from fewshot_rt.kernels.attention_triton import attention_kernel
        from fewshot_rt.kernels.warmup_triton import compile_all

        compile_all([partial(_run, values, one) for one in launches], attention_kernel)
        calls |= {describe(one): partial(_run, values, one, attention_kernel) for one in launches}
        used = launch_for(architecture, dtype=values[0].dtype, width=shape.width, precision="ieee")
        settings = {"architecture": architecture, "in use": describe(used)}
    yield time_calls(KIND, f"launches, {shape}", shape, values, calls, stage, settings)


def describe(launch: Launch) -> str:
    """Name a launch by its numbers."""
    return (
        f"{launch.query_block} queries, {launch.key_block} keys, {launch.warps} warps, "
        f"{launch.stages} stages"
    )


def _run(values: Values, launch: Launch, kernel: Any) -> Tensor:
    query, key, value = values
    scale = query.shape[-1] ** -0.5
    return run_kernel(
        kernel, query, key, value, mask=None, scale=scale, precision="ieee", launch=launch
    )
