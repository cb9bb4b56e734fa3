"""Norms, rotary embeddings and attention in Triton's interpreter, against the reference in fp64.

As in `test_attention_kernel.py`, this file runs itself once as a program that prints the errors of
all cases; the tests compare them with those of torch in the same type.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from test_attention_kernel import DTYPES, FLOOR, _mend_bfloat16

from fewshot_rt.export.parity import KERNEL_RATIO

pytest.importorskip("triton", reason="the kernel is written in triton, which is not installed")

ACROSS, PER_HEAD = "rms_norm_across_heads", "layer_norm"
PARTS = ("query", "key", "answer")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. tables: "none", "shared" by heads, or "own" of each head.

    layout: how tensors lie in memory; "fused" are thirds of one projection, and tables of which
    every value stands twice, as diffusers has them; NaN lies between.
    """

    dtype: str
    kind: str = ACROSS
    tables: str = "shared"
    batch: int = 2
    heads: int = 3
    width: int = 64
    queries: int = 37
    keys: int = 37
    skip: int = 0
    mask: str = "none"
    layout: str = "dense"
    weights: str = "same type"
    architecture: str = "sm_90"
    epsilon: float = 1e-6
    size: float = 1.0

    def __str__(self) -> str:
        given = [f"{v}" for k, v in asdict(self).items() if v != getattr(_DEFAULT, k)]
        return "-".join(given)


_DEFAULT = Case(dtype="")


def cases() -> list[Case]:
    """List shapes that reach every branch once, in each type."""
    layer, own, none = {"kind": PER_HEAD}, {"tables": "own"}, {"tables": "none"}
    text: dict[str, Any] = none | {"queries": 35, "keys": 19}
    shapes = (
        Case(dtype=""),  # Wan
        Case(dtype="", layout="fused"),
        Case(dtype="", queries=1, keys=1, batch=1, heads=1, width=32),
        Case(dtype="", width=32, heads=4, skip=5),
        Case(dtype="", width=40),
        Case(dtype="", width=80, epsilon=0.1),
        Case(dtype="", width=96, heads=2, size=1e-3),
        Case(dtype="", width=128, batch=1, queries=33, keys=33),
        Case(dtype="", width=128, heads=40, batch=1, queries=3, keys=3),  # Wan 14B
        Case(dtype="", **text),
        Case(dtype="", **own),  # LTX
        Case(dtype="", **own, width=32, layout="fused", heads=5),
        Case(dtype="", **own, width=40, queries=1, keys=1),
        Case(dtype="", **text, mask="padded", width=80),
        Case(dtype="", **text, mask="random", layout="fused", weights="fp32"),
        Case(dtype="", **layer, skip=7),  # CogVideoX
        Case(dtype="", **layer, skip=37),  # text alone
        Case(dtype="", **layer, layout="fused", skip=3, weights="fp32"),
        Case(dtype="", **layer, width=40, epsilon=0.1),
        Case(dtype="", **layer, width=80, heads=2, skip=1, size=1e-3),
        Case(dtype="", **layer, width=96, heads=1, mask="random"),
        Case(dtype="", **layer, width=128, queries=17, keys=17),
        Case(dtype="", **layer, width=32, heads=7, skip=2, architecture="sm_80"),
        Case(dtype="", **layer, **own, width=40, heads=5, skip=2),
        Case(dtype="", **layer, **text, mask="one entry sees nothing", weights="fp32"),
    )
    return [replace(shape, dtype=dtype) for dtype in DTYPES for shape in shapes]


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
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_kernels_err_at_most_twice_as_much_as_torch(
    case: Case, part: str, errors: dict[str, dict[str, float]]
) -> None:
    found = errors[f"{case} {part}"]
    for measure, size in (("l2", 1.0), ("max", found["greatest"])):
        limit = KERNEL_RATIO * found[f"torch_{measure}"] + FLOOR * size
        # Written so that NaN fails.
        assert found[f"kernel_{measure}"] <= limit, found


def _thirds(torch: Any, case: Case, *projections: Any) -> list[Any]:
    """Lay projections out in memory as the case wants it, NaN wherever no value lies."""
    if case.layout == "dense":
        return list(projections)
    channels = case.heads * case.width
    laid = []
    for place, dense in enumerate(projections):
        memory = dense.new_full((case.batch + 1, dense.shape[1] + 2, 3 * channels), torch.nan)
        view = memory[1:, 1:-1, place * channels : (place + 1) * channels]
        laid.append(view.copy_(dense))
    return laid


def _tables(torch: Any, case: Case) -> Any:
    if case.tables == "none":
        return None
    pairs = case.width // 2 * (case.heads if case.tables == "own" else 1)
    shape = (case.queries - case.skip, pairs)
    shape = (case.batch, *shape) if case.tables == "own" else shape
    angles = 10 * torch.randn(shape)
    tables = (angles.cos(), angles.sin())
    if case.layout == "dense":
        return tables
    doubled = [torch.stack((t, torch.full_like(t, torch.nan)), -1).flatten(-2) for t in tables]
    return tuple(t[..., 0::2] for t in doubled)


def _mask(torch: Any, case: Case) -> Any:
    if case.mask == "none":
        return None
    if case.mask == "padded":
        return torch.arange(case.keys)[None] < torch.tensor([[5], [case.keys]])
    mask = torch.rand(case.batch, case.keys) < 0.5
    mask[:, 0] = True
    if case.mask == "one entry sees nothing":
        mask[0] = False
    return mask


def _norms(torch: Any, case: Case) -> list[Any]:
    """Draw weight and bias of the queries' norm, then of the keys'."""
    size = case.heads * case.width if case.kind == ACROSS else case.width
    dtype = torch.float32 if case.weights == "fp32" else getattr(torch, case.dtype)
    drawn = [torch.randn(size).to(dtype) for _ in range(4)]
    return [t if case.kind == PER_HEAD or n % 2 == 0 else None for n, t in enumerate(drawn)]


def _truth(reference: Any, case: Case, values: Any, norm: list[Any], tables: Any) -> Any:
    """Prepare queries or keys as the reference does, in fp64."""
    weight, bias = norm
    values, weight = values.double(), weight.double()
    if case.kind == ACROSS:
        normed = reference.rms_norm(values, weight, epsilon=case.epsilon)
    else:
        split = reference.split_heads(values, case.heads)
        normed = reference.layer_norm(split, weight, bias.double(), epsilon=case.epsilon)
        normed = reference.merge_heads(normed)
    if tables is not None and case.tables == "own":
        normed = reference.rotate(normed, tables, skip=case.skip)
    split = reference.split_heads(normed, case.heads)
    if tables is not None and case.tables == "shared":
        split = reference.rotate(split, tables, skip=case.skip)
    return split


def _measure(torch: Any, case: Case) -> dict[str, dict[str, float]]:
    from fewshot_rt.kernels import attention, launches, normed, reference

    dtype, lengths = getattr(torch, case.dtype), (case.queries, case.keys, case.keys)
    shapes = ((case.batch, length, case.heads * case.width) for length in lengths)
    # Away from zero, so that a mean that is not taken off shows.
    dense = [((torch.randn(*shape) + 0.5) * case.size).to(dtype) for shape in shapes]
    given, tables, mask = _thirds(torch, case, *dense), _tables(torch, case), _mask(torch, case)
    norms, scale = _norms(torch, case), case.width**-0.5
    parts = [(given[0], norms[:2]), (given[1], norms[2:])]
    preparation = normed.Preparation(
        heads=case.heads, kind=case.kind, epsilon=case.epsilon, tables=tables, skip=case.skip
    )
    options: dict[str, Any] = {"mask": mask, "scale": scale, "precision": "ieee"}

    launch = launches.row_launch_for(case.architecture, len(norms[0]))
    kernel = normed.prepare_kernel
    found = [
        normed.run_prepare(kernel, values, *norm, preparation=preparation, launch=launch)
        for values, norm in parts
    ]
    value = reference.split_heads(given[2], case.heads)
    launch = launches.launch_for(case.architecture, dtype=dtype, width=case.width, precision="ieee")
    found.append(
        attention.run_kernel(attention.attention_kernel, *found, value, **options, launch=launch)
    )
    official = [normed.prepare(values, *norm, preparation=preparation) for values, norm in parts]
    official.append(attention.attend(*official, value, **options))
    truth = [_truth(reference, case, values, norm, tables) for values, norm in parts]
    truth.append(reference.attention(*truth, value.double(), mask=mask, scale=scale))
    assert all(t.dtype == dtype and t.transpose(1, 2).is_contiguous() for t in found)
    return {
        f"{case} {part}": _errors(*three)
        for part, *three in zip(PARTS, found, official, truth, strict=True)
    }


def _errors(found: Any, official: Any, truth: Any) -> dict[str, float]:
    size, greatest = truth.norm().item() or 1.0, truth.abs().max().item()
    result = {"greatest": greatest}
    for name, answer in (("kernel", found), ("torch", official)):
        difference = answer.double() - truth
        result[f"{name}_l2"] = difference.norm().item() / size
        result[f"{name}_max"] = difference.abs().max().item()
    return result


def _main() -> None:
    import torch

    _mend_bfloat16(torch)
    # With this, what torch.empty gives is NaN until something writes it.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    found: dict[str, dict[str, float]] = {}
    for case in cases():
        found |= _measure(torch, case)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main()
