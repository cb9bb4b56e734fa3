"""Every launch of the kernel that prepares queries and keys, compiled without a GPU.

Reference: what the architectures have. Run as a program, this file prints the figures of all
launches as JSON.
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

from fewshot_rt.kernels.launches import ARCHITECTURES, MOST_CHANNELS, MOST_WIDTH, RowLaunch

TYPES = {"bf16": 2, "fp32": 4}
# Width of rows, head width: models that take the launch, whole blocks or not.
ROWS = {
    32: (32, 32),
    64: (64, 64),  # CogVideoX
    128: (128, 128),
    512: (512, 64),
    2048: (1536, 128),  # Wan 1.3B
    4096: (3072, 128),  # Wan TI2V 5B
    8192: (5120, 128),  # Wan 14B
}
# Without asking for more, a program may have this much shared memory.
MODEST_BYTES = 48 << 10
LAUNCHES = [
    (name, launch, kind)
    for name, architecture in ARCHITECTURES.items()
    for launch in architecture.rows
    for kind in TYPES
]


def label(name: str, launch: RowLaunch, kind: str) -> str:
    return f"{name} {launch.width_block} {kind}"


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
@pytest.mark.parametrize(("name", "launch", "kind"), LAUNCHES)
def test_a_launch_leaves_room_for_others_without_spilling(
    name: str, launch: RowLaunch, kind: str, figures: dict[str, dict[str, Any]]
) -> None:
    found = figures[label(name, launch, kind)]
    # Half of the 2048 threads of a multiprocessor (1536 on sm_89) have their registers at once.
    assert 0 < found["registers"] <= 64
    assert found["stack_bytes"] == 0
    assert found["shared_bytes"] <= MODEST_BYTES
    # Each value is read and written once, 16 bytes at a time.
    values = launch.rows * launch.width_block // (32 * launch.warps)
    assert found["stores"] == {"v4.b32": values * TYPES[kind] // 16}


def test_every_architecture_has_a_launch_for_all_rows() -> None:
    for architecture in ARCHITECTURES.values():
        blocks = [launch.width_block for launch in architecture.rows]
        assert blocks == sorted(blocks)
        assert MOST_WIDTH in blocks
        assert blocks[-1] == MOST_CHANNELS


def _source(launch: RowLaunch, kind: str) -> Any:
    from triton.compiler import ASTSource

    from fewshot_rt.kernels.normed_triton import prepare_kernel

    names, (width, head_width) = prepare_kernel.arg_names, ROWS[launch.width_block]
    signature = dict.fromkeys(names, "i32")
    signature |= dict.fromkeys(("values", "weight", "bias", "out"), f"*{kind}")
    signature |= dict.fromkeys(("cosine", "sine"), "*fp32") | {"epsilon": "fp32"}
    constants = {
        "cosine_pair": 1,
        "sine_pair": 1,
        "WIDTH": width,
        "WIDTH_BLOCK": launch.width_block,
        "GROUPS": 30 if width == head_width else 1,
        "PERIOD": head_width // 2,
        "ROWS": launch.rows,
        "IS_CENTRED": width == head_width,
        "IS_TURNED": True,
    }
    # As Triton itself finds for dense tensors that start at, and step by, multiples of 16.
    aligned = set(names) - set(constants) - {"length", "skip", "epsilon"}
    signature |= dict.fromkeys(constants, "constexpr")
    return ASTSource(
        fn=prepare_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def _compile(name: str, launch: RowLaunch, kind: str) -> dict[str, Any]:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        _source(launch, kind),
        target=GPUTarget("cuda", int(name.removeprefix("sm_")), 32),
        options={"num_warps": launch.warps},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    stores = re.findall(r"st\.global\.(\S+)", compiled.asm["ptx"])
    return {
        "rows": launch.rows,
        "warps": launch.warps,
        "registers": counts["REG"],
        "stack_bytes": counts["STACK"] + counts["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "stores": {width: stores.count(width) for width in set(stores)},
    }


def _main() -> None:
    figures = {label(*entry): _compile(*entry) for entry in LAUNCHES}
    lines = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in figures.items())
    sys.stdout.write("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    _main()
