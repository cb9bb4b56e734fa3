"""Every launch of the attention kernel, compiled for its architecture without a GPU.

Reference: what the architecture has. Run as a program, this file prints the figures of all launches
as JSON.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernel is written in triton, which is not installed")

from fewshot_rt.kernels.launches import ARCHITECTURES, Launch

TYPES = {"half": "bf16", "tf32": "fp32", "ieee": "fp32"}
# The instruction that shows that products run on the matrix cores, in PTX.
PRODUCTS = {
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
}
# Without asking for more, a program may have this much shared memory (TensorRT's plugins may not).
MODEST_BYTES = 48 << 10
LAUNCHES = [
    (name, kind, launch)
    for name, architecture in ARCHITECTURES.items()
    for kind, launches in architecture.launches.items()
    for launch in launches
]


def label(name: str, kind: str, launch: Launch, is_masked: bool) -> str:
    return f"{name} {kind} {launch.width_block}{' masked' if is_masked else ''}"


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Compile in a process of its own, so that nothing else sees triton."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        cwd=tmp_path_factory.mktemp("compiler"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("name", "kind", "launch"), LAUNCHES)
def test_a_launch_fits_its_architecture_without_spilling(
    name: str, kind: str, launch: Launch, is_masked: bool, figures: dict[str, dict[str, Any]]
) -> None:
    found = figures[label(name, kind, launch, is_masked)]
    assert 0 < found["registers"] <= 255
    # Registers that do not fit go to the stack; nothing else in this kernel would.
    assert found["stack_bytes"] == 0
    assert 0 < found["shared_bytes"] <= ARCHITECTURES[name].shared_bytes
    # All threads of a program must have their registers at once.
    assert found["registers"] * 32 * launch.warps <= 1 << 16
    assert (found["products"] > 0) == (kind != "ieee")


@pytest.mark.slow
def test_some_launch_of_width_64_needs_no_leave_for_its_memory(
    figures: dict[str, dict[str, Any]],
) -> None:
    fit = {name for name, found in figures.items() if found["shared_bytes"] <= MODEST_BYTES}
    assert {"sm_80 half 64", "sm_89 half 64", "sm_90 ieee 64", "sm_100 ieee 64"} <= fit


@pytest.mark.slow
def test_numbers_may_come_in_fp64(figures: dict[str, dict[str, Any]]) -> None:
    """Inductor passes them so; the sums stay in fp32, and the code is about the same."""
    usual, found = figures["sm_90 half 64"], figures["fp64"]
    assert found["stack_bytes"] == 0
    assert found["products"] == usual["products"]


def _source(kind: str, launch: Launch, is_masked: bool, number: str = "fp32") -> Any:
    from triton.compiler import ASTSource

    from fewshot_rt.kernels.attention_triton import attention_kernel

    names = attention_kernel.arg_names
    signature = dict.fromkeys(names, "i32")
    signature |= dict.fromkeys(("query", "key", "value", "out"), f"*{TYPES[kind]}")
    signature |= {"mask": "*i1" if is_masked else f"*{TYPES[kind]}", "scale_log2": number}
    # As Triton itself finds for tensors that start at, and step by, multiples of 16.
    aligned = [n for n in names if n.startswith(("query", "key", "value", "out"))]
    aligned = [n for n in aligned if not n.endswith("_length")]
    constants = {
        "WIDTH": launch.width_block,
        "WIDTH_BLOCK": launch.width_block,
        "QUERY_BLOCK": launch.query_block,
        "KEY_BLOCK": launch.key_block,
        "IS_MASKED": is_masked,
        "IS_SPLIT": launch.is_split and not is_masked,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
    }
    signature |= dict.fromkeys(constants, "constexpr")
    return ASTSource(
        fn=attention_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def _compile(
    name: str, kind: str, launch: Launch, is_masked: bool, number: str = "fp32"
) -> dict[str, Any]:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        _source(kind, launch, is_masked, number),
        target=GPUTarget("cuda", int(name.removeprefix("sm_")), 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "blocks": [launch.query_block, launch.key_block],
        "warps": launch.warps,
        "stages": launch.stages,
        "registers": counts["REG"],
        "stack_bytes": counts["STACK"] + counts["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "products": compiled.asm["ptx"].count(PRODUCTS[name]),
    }


def _main() -> None:
    figures = {
        label(*entry, is_masked): _compile(*entry, is_masked)
        for entry in LAUNCHES
        for is_masked in (False, True)
    }
    (usual,) = (entry for entry in LAUNCHES if label(*entry, False) == "sm_90 half 64")
    figures["fp64"] = _compile(*usual, False, number="fp64")
    lines = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in figures.items())
    sys.stdout.write("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    _main()
