"""The attention kernel as PTX, for every architecture and head width that it is made for.

References: what ptxas makes of it; torch's attention, for what it computes (in Triton's
interpreter). Run as a program, this file computes one attention so.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernel is written in triton, which is not installed")

from triton import knobs

from fewshot_rt.kernels import ptx_triton
from fewshot_rt.kernels.launches import ARCHITECTURES
from fewshot_rt.kernels.ptx_triton import MODEST, MODEST_BYTES, attention_ptx, blocks, modest_launch

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (2, 3, 135, 64)  # B, N, L, D
WIDTHS = (64, 128)


def compiled(architecture: str, width: int, dtype: str = "bf16") -> ptx_triton.Ptx:
    shape = (*SHAPE[:3], width)
    return attention_ptx(architecture, dtype, shape=shape, key_length=77, is_packed=True)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_within_what_plugins_may_have(architecture: str, width: int, tmp_path: Path) -> None:
    ptx = compiled(architecture, width, "fp16" if architecture == "sm_89" else "bf16")
    entry = ptx.text.split(f".visible .entry {ptx.name}(")[1].split("{")[0]
    # Queries, keys, values and answers, and nothing of Triton's.
    assert len(re.findall(r"\.param \.u64", entry)) == 4
    assert "_param_4" not in ptx.text
    assert 0 < ptx.shared_bytes <= MODEST_BYTES
    launch = modest_launch(architecture, width)
    assert launch is not None
    assert ptx.blocks == 2 * 3 * -(-135 // launch.query_block)
    assert ptx.threads == 32 * launch.warps
    assert str(ROOT) not in ptx.text
    usage = assemble(ptx, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in usage
    assert int(re.search(r"Used (\d+) registers", usage)[1]) <= 255  # type: ignore[index]


@pytest.mark.parametrize(
    ("architecture", "capability", "target"),
    [("sm_89", (8, 6), "sm_86"), ("sm_89", None, "sm_89"), ("sm_80", (8, 7), "sm_87")],
)
def test_it_is_for_the_gpu_at_hand(
    architecture: str, capability: tuple[int, int] | None, target: str
) -> None:
    """A GPU loads no PTX that is for a later one; launches are those of its kind."""
    ptx = attention_ptx(
        architecture, "bf16", shape=SHAPE, key_length=77, is_packed=True, capability=capability
    )
    assert f".target {target}" in ptx.text


def assemble(ptx: ptx_triton.Ptx, folder: Path) -> str:
    """Assemble the text as a driver would; give what ptxas says of it."""
    (folder / "kernel.ptx").write_text(ptx.text)
    target = re.search(r"\.target (\w+)", ptx.text)
    assert target is not None
    newest = "100" in target[1]
    tool = knobs.nvidia.ptxas_blackwell if newest else knobs.nvidia.ptxas
    command = [tool.path, "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_every_architecture_has_launches_for_the_widths_of_video_models() -> None:
    assert set(MODEST) == set(ARCHITECTURES)
    for launches in MODEST.values():
        assert tuple(launch.width_block for launch in launches) == WIDTHS


def test_other_widths_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"heads 80 wide in bf16\. Possible: 64, 128, in bf16 and"):
        attention_ptx("sm_90", "bf16", shape=(1, 1, 16, 80), key_length=16, is_packed=True)
    with pytest.raises(ValueError, match="heads 64 wide in fp32"):
        attention_ptx("sm_90", "fp32", shape=(1, 1, 16, 64), key_length=16, is_packed=True)


def test_a_parameter_that_is_read_is_not_left_out() -> None:
    text = compiled("sm_80", 64).text.replace("_param_3\n)", "_param_3,\n.param .u64 x_param_4\n)")
    assert "x_param_4" not in ptx_triton._own_parameters(text)[1]
    reading = text.replace("ret;", "ld.param.b64 %rd1, [x_param_4];\n ret;")
    with pytest.raises(ValueError, match="needs scratch memory: x_param_4"):
        ptx_triton._own_parameters(reading)


@pytest.mark.parametrize("is_packed", [True, False])
def test_it_computes_attention_in_either_layout(is_packed: bool) -> None:
    result = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(is_packed)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2e-3  # two roundings of fp16


def _main(is_packed: bool) -> None:
    torch.manual_seed(0)
    batch, heads, length, width = SHAPE
    key_length = 77
    launch = modest_launch("sm_90", width)
    assert launch is not None
    tensors = [
        torch.randn(batch, heads, of, width).half() for of in (length, key_length, key_length)
    ]
    scaled = [(tensors[0].float() * width**-0.5).half(), *tensors[1:]]
    given = [t.transpose(1, 2).contiguous() if is_packed else t for t in scaled]
    out = torch.full_like(given[0], torch.nan)
    baked = ptx_triton.constants(SHAPE, key_length, launch, is_packed=is_packed)
    ptx_triton.packed_attention[(blocks(SHAPE, launch),)](*given, out, **baked)
    answer = (out.transpose(1, 2) if is_packed else out).double()
    truth = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in tensors))
    sys.stdout.write(f"{float((answer - truth).norm() / truth.norm())}\n")


if __name__ == "__main__":
    _main(sys.argv[1] == "True")
