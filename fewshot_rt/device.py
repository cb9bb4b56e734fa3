"""Where arithmetic runs, and how precisely."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import ConfigError, ModelError


def pick_device(device: str) -> str:
    """Choose cuda where there is one, for "auto"; require that any other choice is there.

    Raises: ConfigError if it is neither auto, cpu nor cuda; ModelError if cuda is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}. Possible: auto, cpu, cuda.") from error
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported. Possible: auto, cpu, cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r} is asked for, but PyTorch finds none. Use cpu.")
    return device


def weight_type(device: str) -> torch.dtype:
    """Give the type in which large frozen weights are kept: bf16 on cuda, fp32 on the CPU."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def has_fast_bf16() -> bool:
    """Say whether this processor multiplies bf16 faster than fp32."""
    has_mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def enough_memory() -> Iterator[None]:
    """Say what to do where the memory of a GPU does not suffice.

    Raises: ModelError then.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the GPU's memory does not suffice ({str(error).splitlines()[0]}). What saves most, "
            "first: to train, --weights nf4, --checkpointing, --batch 1, a smaller --size; to "
            "predict, --offload; a task.toml with fewer frames; and other programs off the GPU."
        ) from error


@contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Compute in "fp32" or "bf16"; "auto" takes bf16 where it is fast."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" or has_fast_bf16() else "fp32"
    if precision == "fp32":
        yield
        return
    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16):
        # Norms keep fp32 weights on purpose; PyTorch warns that this takes its unfused kernel.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield
