"""What our operators share: how they are declared, what they refuse, and on which GPUs they run."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op, triton_op

from .launches import PRECISIONS, architecture

HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def declare(name: str) -> Callable[[Callable[..., Tensor]], CustomOpDef]:
    """Declare a function as the operator `fewshot_rt::name`.

    triton_op looks for kernels in what stands above the function, so that caches of compiled graphs
    know their source; without Triton it would only warn that it finds none.
    """
    kind = triton_op if HAS_TRITON else custom_op
    found: Callable[[Callable[..., Tensor]], CustomOpDef] = kind(
        f"fewshot_rt::{name}", mutates_args=()
    )
    return found


def refuse_gradients(operator: CustomOpDef, name: str) -> None:
    """Let an operator raise RuntimeError where a gradient is asked for.

    It is raised at the call: torch's own refusal would come only with the backward pass.
    """

    def refuse(**context: Any) -> None:  # noqa: ARG001
        raise RuntimeError(
            f"fewshot_rt::{name} has no gradient, and an input requires one. Call it under "
            "torch.no_grad(), or train with torch's scaled_dot_product_attention."
        )

    # It refuses before there is anything to go back from.
    operator.register_autograd(refuse, setup_context=refuse)


def architecture_of(device: torch.device) -> str:
    """Name the architecture whose launches a GPU takes.

    Raises: RuntimeError without Triton; ValueError if the GPU has no launches.
    """
    if not HAS_TRITON:
        raise RuntimeError(
            f"attention on {device} needs the package 'triton', which is not installed. "
            "Install fewshot-rt[cuda], or keep torch's scaled_dot_product_attention."
        )
    return architecture(torch.cuda.get_device_capability(device))


def dense(tensor: Tensor) -> Tensor:
    """Give a tensor whose last axis is dense in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Given:
    """Names, shapes and types of tensors, spelled out only where a message needs them."""

    def __init__(self, **tensors: Tensor | None) -> None:
        self._tensors = tensors

    def __str__(self) -> str:
        found = {name: tensor for name, tensor in self._tensors.items() if tensor is not None}
        return ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in found.items())


def check_arithmetic(query: Tensor, *, scale: float | None, precision: str) -> None:
    """Refuse scales and precisions that no kernel has. Raises: ValueError."""
    if scale is not None and scale <= 0:
        raise ValueError(f"the scale must be positive, got {scale}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown. Possible: {', '.join(PRECISIONS)}.")
    if precision != "ieee" and query.dtype is not torch.float32:
        raise ValueError(f"precision {precision!r} is for fp32, got {Given(query=query)}")


def check_mask(mask: Tensor | None, expected: tuple[int, int], device: torch.device) -> None:
    """Refuse a mask that is not bool, on the device, of the expected [B, K]. Raises: ValueError."""
    if mask is None:
        return
    is_bool_on_device = mask.dtype is torch.bool and mask.device == device
    if mask.shape != expected or not is_bool_on_device:
        raise ValueError(
            f"the mask must be bool {list(expected)} on {device}, got {mask.dtype} "
            f"{list(mask.shape)} on {mask.device}"
        )
