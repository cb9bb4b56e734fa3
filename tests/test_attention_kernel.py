"""The attention kernel in Triton's interpreter, on the CPU, against the reference in fp64.

The interpreter must be chosen before triton is imported, so this file runs itself once as a program
that prints the errors of all cases; the tests compare them with those of torch in the same type.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fewshot_rt.export.parity import KERNEL_RATIO

pytest.importorskip("triton", reason="the kernel is written in triton, which is not installed")

DTYPES = ("bfloat16", "float16", "float32")
# One rounding of the fp32 sums: where torch happens to round nothing (a single key), we may once.
FLOOR = 2**-24


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. layout: how the tensors lie in memory; but for "dense", NaN lies between them."""

    dtype: str
    batch: int = 1
    heads: int = 2
    queries: int = 130
    keys: int = 77
    width: int = 64
    mask: str = "none"
    layout: str = "dense"
    precision: str = "ieee"
    architecture: str = "sm_90"
    scale: float | None = None

    def __str__(self) -> str:
        given = [f"{v}" for k, v in asdict(self).items() if v != getattr(_DEFAULT, k)]
        return "-".join(given)


_DEFAULT = Case(dtype="")


def cases() -> list[Case]:
    """List shapes that reach every branch once, in each type."""
    shapes = (
        Case(dtype=""),
        Case(dtype="", queries=1, keys=1),
        Case(dtype="", queries=1, keys=129, batch=3),
        Case(dtype="", queries=257, keys=1),
        Case(dtype="", queries=128, keys=128),  # no edge
        Case(dtype="", queries=65, keys=226, heads=3, scale=0.5),
        Case(dtype="", queries=33, width=32),
        Case(dtype="", queries=33, width=40),
        Case(dtype="", queries=33, width=80),
        Case(dtype="", queries=33, width=96),
        Case(dtype="", queries=33, width=128),
        Case(dtype="", queries=33, keys=128, mask="padded", batch=3),
        Case(dtype="", queries=33, keys=131, mask="random", batch=2, width=40),
        Case(dtype="", queries=5, keys=70, mask="one entry sees nothing", batch=2),
        Case(dtype="", batch=2, layout="strided"),
        Case(dtype="", batch=2, layout="strided", mask="random", width=80, queries=7),
        Case(dtype="", layout="last axis not dense", queries=19),
        Case(dtype="", architecture="sm_80", width=128, queries=140),
        Case(dtype="", architecture="sm_89", width=128, queries=140),
        Case(dtype="", architecture="sm_100", queries=140, keys=200),
    )
    found = [replace(shape, dtype=dtype) for dtype in DTYPES for shape in shapes]
    # The interpreter multiplies in fp32 whatever is asked: this tries the launch, not tf32.
    return [*found, replace(_DEFAULT, dtype="float32", precision="tf32", architecture="sm_100")]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Run this file as a program, and read what it prints."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        cwd=tmp_path_factory.mktemp("interpreter"),
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, float]] = json.loads(result.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_kernel_errs_at_most_twice_as_much_as_torch(
    case: Case, errors: dict[str, dict[str, float]]
) -> None:
    found = errors[str(case)]
    for measure, size in (("l2", 1.0), ("max", found["greatest"])):
        limit = KERNEL_RATIO * found[f"torch_{measure}"] + FLOOR * size
        # Written so that NaN fails.
        assert found[f"kernel_{measure}"] <= limit, found


def _poisoned(torch: Any, dense: Any, layout: str, *, extra: int) -> Any:
    """Lay [B, N, L, D] out in memory as the case wants it, NaN wherever no value lies.

    extra: how much more of it, so that no two tensors have the same strides.
    """
    if layout == "dense":
        return dense
    batch, heads, length, width = dense.shape
    if layout == "strided":
        memory = dense.new_full((batch + 1, length + 130, heads + extra, width + 8), torch.nan)
        view = memory[1:, 2 : length + 2, extra:, :width].transpose(1, 2)
    else:
        view = dense.new_full((batch, heads, width, length + 3), torch.nan)
        view = view[..., :length].transpose(-1, -2)
    return view.copy_(dense)


def _mask(torch: Any, case: Case) -> Any:
    if case.mask == "none":
        return None
    if case.mask == "padded":
        ends = torch.tensor([1, 64, 100][: case.batch])
        return torch.arange(case.keys)[None] < ends[:, None]
    mask = torch.rand(case.batch, case.keys) < 0.5
    mask[:, 0] = True
    if case.mask == "one entry sees nothing":
        mask[0] = False
    return mask


def _measure(torch: Any, case: Case) -> dict[str, float]:
    from fewshot_rt.kernels import reference
    from fewshot_rt.kernels.attention import attention, attention_kernel, run_kernel
    from fewshot_rt.kernels.launches import launch_for

    dtype, width = getattr(torch, case.dtype), case.width
    dense = [
        torch.randn(case.batch, case.heads, length, width).to(dtype)
        for length in (case.queries, case.keys, case.keys)
    ]
    scale = width**-0.5 if case.scale is None else case.scale
    mask, options = _mask(torch, case), {"dtype": dtype, "width": width}
    found = run_kernel(
        attention_kernel,
        *(_poisoned(torch, t, case.layout, extra=n) for n, t in enumerate(dense, 1)),
        mask=mask,
        scale=scale,
        precision=case.precision,
        launch=launch_for(case.architecture, precision=case.precision, **options),
    )
    assert found.dtype == dtype
    truth = reference.attention(*(t.double() for t in dense), mask=mask, scale=scale)
    official = attention(*dense, mask, scale)
    size, greatest = truth.norm().item() or 1.0, truth.abs().max().item()
    result = {"greatest": greatest}
    for name, answer in (("kernel", found), ("torch", official)):
        difference = answer.double() - truth
        result[f"{name}_l2"] = difference.norm().item() / size
        result[f"{name}_max"] = difference.abs().max().item()
    return result


def _mend_bfloat16(torch: Any) -> None:
    """Give the interpreter products and roundings of bf16.

    Triton 3.7's takes the 16 bits of a bf16 in a product for a whole number, and cuts bits off
    where it should round to the nearest.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    multiply, convert = builder.create_dot, builder.cast_impl

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widen(a), widen(b), *rest)

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return convert(self, source, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _main() -> None:
    import torch

    _mend_bfloat16(torch)
    # With this, what torch.empty gives is NaN until something writes it.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    json.dump({str(case): _measure(torch, case) for case in cases()}, sys.stdout)


if __name__ == "__main__":
    _main()
