"""The attention kernel as PTX, as TensorRT's plugin has it, started by the driver alone.

Neither Triton nor TensorRT takes part in the call: four pointers, a grid, threads, shared memory.
Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width.
"""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewshot_rt.errors import EngineError
from fewshot_rt.kernels import reference
from fewshot_rt.kernels.declaration import architecture_of

from .gpu_units import Stage, require_level

if TYPE_CHECKING:
    from fewshot_rt.kernels.ptx_triton import Ptx

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
REHEARSED = "sm_90"
# [B, N, L, D] and K: both widths, whole blocks and edges, keys of their own.
SIZES = (((2, 3, 256, 64), 256), ((1, 3, 300, 64), 77), ((2, 2, 129, 128), 129))


def check_ptx(stage: Stage) -> dict[str, float]:
    """Require that PTX errs at most `KERNEL_RATIO` times as much as torch does.

    What it writes to is NaN before. Without a GPU it is compiled, and torch answers in its place.
    Give the worst ratio, and how many cases there were.
    Raises: EngineError that names the first case that fails, or a call of the driver.
    """
    from fewshot_rt.kernels.ptx_triton import attention_ptx

    name, capability = REHEARSED, None
    if stage.device == "cuda":
        name = architecture_of(torch.device(stage.device))
        capability = torch.cuda.get_device_capability()
    ratios = []
    for kind, dtype in TYPES.items():
        for is_packed in (False, True):
            for shape, key_length in SIZES:
                ptx = attention_ptx(
                    name,
                    kind,
                    shape=shape,
                    key_length=key_length,
                    is_packed=is_packed,
                    capability=capability,
                )
                case = f"{kind}, {shape} and {key_length} keys, packed {is_packed}"
                values = _draw(shape, key_length, dtype, stage.device, is_packed=is_packed)
                ratios.append(_compare(ptx, values, case))
    return {"worst_ratio": max(ratios), "cases": len(ratios)}


def launch(ptx: "Ptx", tensors: Sequence[Tensor]) -> None:
    """Start a kernel on tensors of one GPU, and wait for it. Raises: EngineError if that fails."""
    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _require(driver.cuModuleLoadData(ctypes.byref(module), ptx.text.encode()), "load")
    try:
        found = driver.cuModuleGetFunction(ctypes.byref(function), module, ptx.name.encode())
        _require(found, "find")
        pointers = [ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors]
        places = (ctypes.c_void_p * len(pointers))(*map(ctypes.addressof, pointers))
        grid, threads = (ptx.blocks, 1, 1), (ptx.threads, 1, 1)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _require(
            driver.cuLaunchKernel(
                function, *grid, *threads, ptx.shared_bytes, stream, places, None
            ),
            "start",
        )
        torch.cuda.synchronize()
    finally:
        driver.cuModuleUnload(module)


def _draw(
    shape: tuple[int, int, int, int],
    key_length: int,
    dtype: torch.dtype,
    device: str,
    *,
    is_packed: bool,
) -> list[Tensor]:
    """Draw queries, keys and values, heads side by side in memory where they are packed."""
    torch.manual_seed(0)
    batch, heads, length, width = shape
    values = []
    for tokens in (length, key_length, key_length):
        order = (batch, tokens, heads, width) if is_packed else (batch, heads, tokens, width)
        drawn = torch.randn(order).to(dtype).to(device)
        values.append(drawn.transpose(1, 2) if is_packed else drawn)
    return values


def _compare(ptx: "Ptx", values: Sequence[Tensor], case: str) -> float:
    query, key, value = values
    width = query.shape[-1]
    truth = reference.attention(*(tensor.cpu().double() for tensor in values))
    torchs = scaled_dot_product_attention(query, key, value)
    # Queries come multiplied by the scale, which rounds them once more; widths of 64 do not.
    scaled = (query.float() * width**-0.5).to(query.dtype)
    ours = torch.full_like(query, torch.nan)
    if query.is_cuda:
        launch(ptx, (scaled, key, value, ours))
    else:
        ours = scaled_dot_product_attention(scaled, key, value, scale=1.0)
    return require_level(ours, torchs, truth, f"as PTX, {case}", floor=0.0)


def _require(status: int, what: str) -> None:
    """Raises: EngineError if a call of the driver failed."""
    if status:
        raise EngineError(f"the driver could not {what} the kernel (CUDA error {status}).")
