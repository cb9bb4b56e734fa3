"""Attention as the operator `fewshot_rt::attention`: our Triton kernel on CUDA, SDPA on the CPU.

Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width.
"""

import math
from typing import Any

from torch import Tensor
from torch.library import wrap_triton
from torch.nn.functional import scaled_dot_product_attention

from .declaration import (
    DTYPES,
    HAS_TRITON,
    Given,
    architecture_of,
    check_arithmetic,
    check_mask,
    declare,
    dense,
    refuse_gradients,
)
from .launches import MOST_WIDTH, Launch, launch_for

if HAS_TRITON:
    from .attention_triton import attention_kernel


def run_kernel(
    kernel: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    precision: str,
    launch: Launch,
) -> Tensor:
    """Start the kernel over all blocks of queries, and give what it wrote."""
    (batch, heads, length, width), key_length = query.shape, key.shape[2]
    query, key, value = dense(query), dense(key), dense(value)
    mask = None if mask is None else dense(mask)
    out = _empty(query)
    blocks = (length + launch.query_block - 1) // launch.query_block
    kernel[(blocks * batch * heads,)](
        query,
        key,
        value,
        # An unused pointer must still be one.
        query if mask is None else mask,
        out,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        0 if mask is None else mask.stride(0),
        *out.stride()[:3],
        heads,
        length,
        key_length,
        scale * math.log2(math.e),
        WIDTH=width,
        WIDTH_BLOCK=launch.width_block,
        QUERY_BLOCK=launch.query_block,
        KEY_BLOCK=launch.key_block,
        IS_MASKED=mask is not None,
        # The mask bounds each block anyway.
        IS_SPLIT=launch.is_split and mask is None,
        PRECISION=precision,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    counts = None if mask is None else mask[:, None, None, :]
    out = scaled_dot_product_attention(query, key, value, attn_mask=counts, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    precision: str,
) -> Tensor:
    launch = launch_for(
        architecture_of(query.device),
        dtype=query.dtype,
        width=query.shape[-1],
        precision=precision,
    )
    return run_kernel(
        wrap_triton(attention_kernel),
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        precision=precision,
        launch=launch,
    )


def _empty(query: Tensor) -> Tensor:
    batch, heads, length, width = query.shape
    return query.new_empty((batch, length, heads, width)).transpose(1, 2)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    precision: str,
) -> None:
    given = Given(query=query, key=key, value=value)
    if any(t.dim() != 4 or t.dtype not in DTYPES for t in (query, key, value)):
        raise ValueError(f"attention takes [B, N, L, D] in bf16, fp16 or fp32, got {given}")
    if any(t.dtype != query.dtype or t.device != query.device for t in (key, value)):
        raise ValueError(f"attention takes one type and device, got {given}")
    batch, heads, _, width = query.shape
    fits = key.shape[:2] == (batch, heads) and key.shape[3] == width
    if not fits or value.shape != key.shape:
        raise ValueError(f"keys and values must share batch, heads and width, got {given}")
    if width > MOST_WIDTH:
        raise ValueError(f"heads may be at most {MOST_WIDTH} wide, got {given}")
    check_mask(mask, (batch, key.shape[2]), query.device)
    check_arithmetic(query, scale=scale, precision=precision)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    scale: float | None,
    precision: str,
) -> Tensor:
    """Compute what the operator gives, without its checks, for operators that have their own."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.device.type == "cpu":
        return _on_cpu(query, key, value, mask, scale)
    return _on_cuda(query, key, value, mask, scale, precision)


@declare("attention")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Give softmax(query key^T scale) value; a query that may see no key gives zeros.

    Shapes: query [B, N, L, D]; key, value [B, N, K, D]; mask [B, K], true where a key counts; the
    answer [B, N, L, D], its heads side by side in memory as in [B, L, N D].
    scale: D^-1/2 if none is given; it must be positive.
    precision: of the products in fp32, "ieee" or "tf32" (which the CPU computes as "ieee").
    Raises: ValueError for what does not fit; RuntimeError if a gradient is asked for, and on CUDA
    without Triton.
    """
    _check(query, key, value, mask, scale, precision)
    return attend(query, key, value, mask=mask, scale=scale, precision=precision)


@attention.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    precision: str = "ieee",
) -> Tensor:
    _check(query, key, value, mask, scale, precision)
    return _empty(query)


refuse_gradients(attention, "attention")
