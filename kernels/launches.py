"""How the kernels are cut into blocks on each architecture; nothing is tuned at run time.

Where no GPU was at hand, the values were chosen from what the compiler reports: no register is
spilled with or without a mask, what a block needs fits the architecture's shared memory, and
within that the largest blocks of queries, which read keys and values least often. Every line is
compiled in `tests/test_kernels_compiled.py` and `tests/test_kernels_normed_compiled.py`.
"""

from dataclasses import dataclass

import torch

PRECISIONS = ("ieee", "tf32")
MOST_WIDTH = 128
MOST_CHANNELS = 8192


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One configuration: block sizes in tokens, warps of a program, stages of the loop over keys.

    width_block: the head width it is for, a power of two; narrower heads are padded to it.
    is_split: whole blocks of keys run without bounds, and the edge after them.
    """

    width_block: int
    query_block: int
    key_block: int
    warps: int
    stages: int
    is_split: bool = True


@dataclass(frozen=True, kw_only=True)
class RowLaunch:
    """One configuration of what goes over rows once: rows and warps of a program.

    width_block: the width of rows it is for, a power of two; narrower rows are padded to it.
    """

    width_block: int
    rows: int
    warps: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One generation of GPUs: the shared memory a program may have, and its launches.

    launches: of the attention kernel, by kind. rows: of the kernel that prepares its inputs.
    """

    shared_bytes: int
    launches: dict[str, tuple[Launch, ...]]
    rows: tuple[RowLaunch, ...]


def _by_width(
    query_block: int,
    key_block: int,
    *,
    warps: int,
    stages: int,
    widths: tuple[int, ...] = (32, 64, 128),
    is_split: bool = True,
) -> tuple[Launch, ...]:
    return tuple(
        Launch(
            width_block=width,
            query_block=query_block,
            key_block=key_block,
            warps=warps,
            stages=stages,
            is_split=is_split,
        )
        for width in widths
    )


# Products in full fp32 run outside the matrix cores and keep whole rows in registers: small blocks,
# many warps, one copy of the loop's body.
_IEEE = _by_width(64, 32, warps=8, stages=2, is_split=False)
# fp32 is twice as wide in memory, so half as many keys are under way as in bf16.
_TF32 = _by_width(128, 32, warps=8, stages=2)

# Four warps of 32 queries where the registers suffice, else eight of 16.
_HALF = (
    *_by_width(128, 64, warps=4, stages=3, widths=(32, 64)),
    *_by_width(128, 64, warps=8, stages=3, widths=(128,)),
)

# Memory alone bounds what goes over rows once. Sixteen values a thread: two loads of 16 bytes in
# bf16, at most 64 registers, so that half of the threads a multiprocessor can have are under way.
_ROWS = (
    *(RowLaunch(width_block=width, rows=2048 // width, warps=4) for width in (32, 64, 128)),
    *(RowLaunch(width_block=width, rows=4096 // width, warps=8) for width in (512, 2048, 4096)),
    RowLaunch(width_block=8192, rows=1, warps=16),
)

ARCHITECTURES = {
    # A100: mma of one warp. Four warps of 32 queries read keys from shared memory half as often as
    # eight of 16, and two programs fit; at width 128 only eight have the registers.
    "sm_80": Architecture(
        shared_bytes=163 << 10,
        launches={
            "half": _HALF,
            "tf32": _TF32,
            "ieee": _IEEE,
        },
        rows=_ROWS,
    ),
    # Consumer cards: 99 KiB. ptxas spills with four warps here; at width 128, 64 keys do not fit.
    "sm_89": Architecture(
        shared_bytes=99 << 10,
        launches={
            "half": (
                *_by_width(128, 64, warps=8, stages=3, widths=(32, 64)),
                *_by_width(128, 32, warps=8, stages=3, widths=(128,)),
            ),
            "tf32": _TF32,
            "ieee": _IEEE,
        },
        rows=_ROWS,
    ),
    # H100: wgmma of four warps. At width 64 several programs of one warp group share a
    # multiprocessor, so that one takes exponents while another multiplies; at width 128 one program
    # of two groups. Widths 64 and 128 in half precision are the fastest of 67 that were timed on an
    # H100 (`benchmarks/gpu_launches.py`).
    "sm_90": Architecture(
        shared_bytes=227 << 10,
        launches={
            "half": (
                *_by_width(128, 64, warps=4, stages=3, widths=(32,)),
                *_by_width(64, 64, warps=4, stages=3, widths=(64,)),
                *_by_width(128, 128, warps=8, stages=3, widths=(128,)),
            ),
            "tf32": _TF32,
            "ieee": _IEEE,
        },
        rows=_ROWS,
    ),
    # B200: tcgen05, accumulators in tensor memory; in bf16 as on A100, in tf32 two stages spill.
    # From 64 queries on, Triton 3.7 sends products in full fp32 to the matrix cores, as tf32.
    "sm_100": Architecture(
        shared_bytes=227 << 10,
        launches={
            "half": _HALF,
            "tf32": _by_width(128, 32, warps=8, stages=3),
            "ieee": _by_width(32, 32, warps=8, stages=2, is_split=False),
        },
        rows=_ROWS,
    ),
}
# By compute capability. Those of one line have the matrix instructions and no less shared memory.
_CAPABILITIES = {
    (8, 0): "sm_80",
    (8, 6): "sm_89",
    (8, 7): "sm_80",
    (8, 9): "sm_89",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (12, 0): "sm_89",
    (12, 1): "sm_89",
}


def architecture(capability: tuple[int, int]) -> str:
    """Name the architecture whose launches a GPU of this compute capability takes.

    Raises: ValueError if there is none.
    """
    if capability not in _CAPABILITIES:
        possible = ", ".join(f"{major}.{minor}" for major, minor in _CAPABILITIES)
        raise ValueError(
            f"the attention kernel has no configuration for compute capability "
            f"{capability[0]}.{capability[1]}. Possible: {possible}. Use torch's "
            "scaled_dot_product_attention on this GPU."
        )
    return _CAPABILITIES[capability]


def launch_for(name: str, *, dtype: torch.dtype, width: int, precision: str) -> Launch:
    """Give the launch for heads of a width, in a type and precision, on a named architecture."""
    kind = precision if dtype is torch.float32 else "half"
    return next(
        launch for launch in ARCHITECTURES[name].launches[kind] if width <= launch.width_block
    )


def row_launch_for(name: str, width: int) -> RowLaunch:
    """Give the launch for rows of a width on a named architecture."""
    return next(launch for launch in ARCHITECTURES[name].rows if width <= launch.width_block)
