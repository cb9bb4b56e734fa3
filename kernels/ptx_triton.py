"""The attention kernel as PTX for one set of shapes, for runtimes that launch it without Triton.

TensorRT's ahead-of-time plugins pass a kernel its inputs, whole numbers, and its outputs, in this
order; they do not ask for more than 48 KiB of shared memory. So all but the four tensors is baked
in, the scale is 1 (queries come multiplied by theirs), and launches are modest.
Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width.
"""

import math
import re
from dataclasses import dataclass

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .attention_triton import attention_kernel
from .launches import Launch

MODEST_BYTES = 48 << 10
TENSORS = ("query", "key", "value", "out")
TYPES = ("bf16", "fp16")
_ENTRY = re.compile(r"(\.visible \.entry (\w+)\()(.*?)(\n?\)\n)", re.DOTALL)
_THREADS = re.compile(r"\.reqntid (\d+)")


def _launches(*rows: tuple[int, int, int, int, int]) -> tuple[Launch, ...]:
    return tuple(
        Launch(width_block=width, query_block=queries, key_block=keys, warps=warps, stages=stages)
        for width, queries, keys, warps, stages in rows
    )


# By architecture and head width: the largest blocks of queries, then of keys, then the most stages,
# that fit without spilling, as the compiler reports. On sm_90 width 64 is the fastest of those that
# fit and were timed on an H100.
MODEST = {
    "sm_80": _launches((64, 128, 64, 4, 3), (128, 128, 32, 8, 2)),
    "sm_89": _launches((64, 128, 64, 8, 3), (128, 128, 32, 8, 2)),
    "sm_90": _launches((64, 64, 32, 4, 3), (128, 64, 32, 4, 2)),
    "sm_100": _launches((64, 128, 32, 4, 3), (128, 64, 16, 4, 3)),
}


@dataclass(frozen=True, kw_only=True)
class Ptx:
    """A kernel as text, and how it is launched: blocks of a grid, threads and memory of one."""

    name: str
    text: str
    blocks: int
    threads: int
    shared_bytes: int


@triton.jit
def packed_attention(
    query,
    key,
    value,
    out,
    QUERY_STRIDES: tl.constexpr,
    KEY_STRIDES: tl.constexpr,
    HEADS: tl.constexpr,
    LENGTH: tl.constexpr,
    KEY_LENGTH: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """Attend as `attention_kernel`, unmasked, with strides and sizes that are known.

    Shapes: query, out [B, N, L, D]; key, value [B, N, K, D], in memory as the strides say.
    """
    attention_kernel(
        query,
        key,
        value,
        query,  # a mask that is not read
        out,
        QUERY_STRIDES[0],
        QUERY_STRIDES[1],
        QUERY_STRIDES[2],
        KEY_STRIDES[0],
        KEY_STRIDES[1],
        KEY_STRIDES[2],
        KEY_STRIDES[0],
        KEY_STRIDES[1],
        KEY_STRIDES[2],
        0,
        QUERY_STRIDES[0],
        QUERY_STRIDES[1],
        QUERY_STRIDES[2],
        HEADS,
        LENGTH,
        KEY_LENGTH,
        SCALE_LOG2,
        WIDTH,
        WIDTH_BLOCK,
        QUERY_BLOCK,
        KEY_BLOCK,
        False,
        True,
        "ieee",
    )


def modest_launch(architecture: str, width: int) -> Launch | None:
    """Give the launch for heads of a width; None if they are too narrow or wide."""
    return next((one for one in MODEST[architecture] if one.width_block == width), None)


def constants(
    shape: tuple[int, int, int, int], key_length: int, launch: Launch, *, is_packed: bool
) -> dict[str, object]:
    """Give what is baked into the kernel, by name.

    Shapes: shape [B, N, L, D] of the queries. is_packed: whether memory has [B, L, N, D].
    """
    _, heads, length, width = shape
    return {
        "QUERY_STRIDES": _strides(heads, length, width, is_packed=is_packed),
        "KEY_STRIDES": _strides(heads, key_length, width, is_packed=is_packed),
        "HEADS": heads,
        "LENGTH": length,
        "KEY_LENGTH": key_length,
        "SCALE_LOG2": math.log2(math.e),
        "WIDTH": width,
        "WIDTH_BLOCK": launch.width_block,
        "QUERY_BLOCK": launch.query_block,
        "KEY_BLOCK": launch.key_block,
    }


def blocks(shape: tuple[int, int, int, int], launch: Launch) -> int:
    """Count the programs: one for each block of queries of each head."""
    batch, heads, length, _ = shape
    return -(-length // launch.query_block) * batch * heads


def attention_ptx(
    architecture: str,
    dtype: str,
    *,
    shape: tuple[int, int, int, int],
    key_length: int,
    is_packed: bool,
    capability: tuple[int, int] | None = None,
) -> Ptx:
    """Compile the kernel for one GPU and one set of shapes, without Triton's own parameters.

    dtype: of `TYPES`. shape, is_packed: see `constants`. capability: of the GPU, if it is another
    than the one that the architecture is named after: PTX for 8.9 does not load on 8.6.
    Raises: ValueError if there is no launch for the width, or a parameter of Triton's is used.
    """
    launch = modest_launch(architecture, shape[3])
    if launch is None or dtype not in TYPES:
        widths = ", ".join(str(one.width_block) for one in MODEST[architecture])
        raise ValueError(
            f"no launch for heads {shape[3]} wide in {dtype}. Possible: {widths}, in "
            f"{' and '.join(TYPES)}."
        )
    baked = constants(shape, key_length, launch, is_packed=is_packed)
    names = packed_attention.arg_names
    source = ASTSource(
        fn=packed_attention,
        signature=dict.fromkeys(TENSORS, f"*{dtype}") | dict.fromkeys(baked, "constexpr"),
        constexprs={(names.index(name),): value for name, value in baked.items()},
        # TensorRT's tensors start at multiples of 256 bytes.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in TENSORS},
    )
    # Lines of the source would put the paths of this machine into every engine.
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", _target(architecture, capability), 32),
            options={"num_warps": launch.warps, "num_stages": launch.stages},
        )
    name, text = _own_parameters(compiled.asm["ptx"])
    return Ptx(
        name=name,
        text=text,
        blocks=blocks(shape, launch),
        threads=_threads(text),
        shared_bytes=compiled.metadata.shared,
    )


def _target(architecture: str, capability: tuple[int, int] | None) -> int:
    """Give the number that Triton knows a GPU by."""
    if capability is None:
        return int(architecture.removeprefix("sm_"))
    return 10 * capability[0] + capability[1]


def _threads(text: str) -> int:
    """Read how many threads a block has. Raises: ValueError if it does not say."""
    found = _THREADS.search(text)
    if found is None:
        raise ValueError("Triton's PTX does not say how many threads a block has")
    return int(found[1])


def _strides(heads: int, length: int, width: int, *, is_packed: bool) -> tuple[int, int, int]:
    """Give the strides of batch, head and token."""
    whole = heads * length * width
    return (whole, width, heads * width) if is_packed else (whole, length * width, width)


def _own_parameters(text: str) -> tuple[str, str]:
    """Leave out the parameters that Triton appends, pointers to scratch memory; give name and text.

    Raises: ValueError if one of them is read.
    """
    found = _ENTRY.search(text)
    if found is None:
        raise ValueError("Triton's PTX has no entry")
    parameters = found[3].split(",")
    own, others = parameters[: len(TENSORS)], parameters[len(TENSORS) :]
    text = text[: found.start(3)] + ",".join(own) + text[found.end(3) :]
    for parameter in others:
        if re.search(rf"\b{parameter.split()[-1]}\b", text):
            raise ValueError(f"the kernel needs scratch memory: {parameter.split()[-1]}")
    return found[2], text
