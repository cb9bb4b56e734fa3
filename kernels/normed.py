"""Attention from projections as the operator `fewshot_rt::normed_attention`.

It normalises queries and keys, turns them by a rotary embedding, splits heads, and attends. On CUDA
our kernels do so; on the CPU torch does, with diffusers' order and roundings.

Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width, C = N D.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.nn.functional import layer_norm, rms_norm

from .attention import attend
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
from .launches import MOST_CHANNELS, MOST_WIDTH, RowLaunch, row_launch_for
from .reference import Tables, merge_heads, rotate, split_heads

if HAS_TRITON:
    from .normed_triton import prepare_kernel

# diffusers' names: Wan and LTX have the former, CogVideoX the latter.
ACROSS_HEADS, PER_HEAD = "rms_norm_across_heads", "layer_norm"
KINDS = (ACROSS_HEADS, PER_HEAD)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to queries and keys alike before they attend.

    kind: of the norm, one of KINDS. tables: cosine and sine, [L - skip, D / 2] for all heads or
    [B, L - skip, C / 2] for each its own. skip: how many first tokens are not turned.
    """

    heads: int
    kind: str
    epsilon: float
    tables: Tables | None = None
    skip: int = 0


def prepare(
    values: Tensor, weight: Tensor, bias: Tensor | None, *, preparation: Preparation
) -> Tensor:
    """Normalise, turn and split queries or keys; on the CPU rounded after each, as in diffusers.

    Shapes: values [B, L, C]; weight, bias [C] across heads, [D] per head; the answer [B, N, L, D].
    """
    if values.device.type == "cpu":
        return _prepare_on_cpu(values, weight, bias, preparation)
    return _prepare_on_cuda(values, weight, bias, preparation)


def _prepare_on_cpu(
    values: Tensor, weight: Tensor, bias: Tensor | None, preparation: Preparation
) -> Tensor:
    epsilon = preparation.epsilon
    if preparation.kind == ACROSS_HEADS:
        # torch would do the same without widening, but warns where the weight alone is in fp32.
        normed = rms_norm(values.float(), weight.shape, weight.float(), epsilon).to(values.dtype)
        split = split_heads(normed, preparation.heads)
    else:
        split = split_heads(values, preparation.heads)
        split = layer_norm(split, weight.shape, weight, bias, epsilon)
    if preparation.tables is None:
        return split
    cosine, sine = (
        table if table.dim() == 2 else split_heads(table, preparation.heads)
        for table in preparation.tables
    )
    return rotate(split, (cosine, sine), skip=preparation.skip).to(values.dtype)


def run_prepare(
    kernel: Any,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    preparation: Preparation,
    launch: RowLaunch,
) -> Tensor:
    """Start the kernel over all rows, and give what it wrote, in the shapes of `prepare`."""
    values, (batch, length, channels), width = dense(values), values.shape, weight.shape[0]
    out = values.new_empty((batch, length, channels))
    blocks = (length * (channels // width) + launch.rows - 1) // launch.rows
    weight = weight.contiguous()
    # An unused pointer must still be one.
    cosine, sine = preparation.tables or (values, values)
    kernel[(blocks * batch,)](
        values,
        weight,
        weight if bias is None else bias.contiguous(),
        cosine,
        sine,
        out,
        *values.stride()[:2],
        *_table_strides(cosine),
        *_table_strides(sine),
        length,
        preparation.skip,
        preparation.epsilon,
        WIDTH=width,
        WIDTH_BLOCK=launch.width_block,
        GROUPS=channels // width,
        PERIOD=cosine.shape[-1],
        ROWS=launch.rows,
        IS_CENTRED=preparation.kind == PER_HEAD,
        IS_TURNED=preparation.tables is not None,
        num_warps=launch.warps,
    )
    return split_heads(out, preparation.heads)


def _table_strides(table: Tensor) -> tuple[int, ...]:
    """Give the steps to the next entry, token and pair."""
    return table.stride() if table.dim() == 3 else (0, *table.stride())


def _prepare_on_cuda(
    values: Tensor, weight: Tensor, bias: Tensor | None, preparation: Preparation
) -> Tensor:
    launch = row_launch_for(architecture_of(values.device), weight.shape[0])
    return run_prepare(
        wrap_triton(prepare_kernel),
        values,
        weight,
        bias,
        preparation=preparation,
        launch=launch,
    )


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    cosine: Tensor | None,
    sine: Tensor | None,
    mask: Tensor | None,
    heads: int,
    *,
    kind: str,
    epsilon: float,
    skip: int = 0,
    scale: float | None = None,
    precision: str = "ieee",
) -> Preparation:
    """Take what the operator takes, refuse what does not fit, and give what is left to do."""
    _check_projections(query, key, value, heads)
    tables = None if cosine is None or sine is None else (cosine, sine)
    preparation = Preparation(heads=heads, kind=kind, epsilon=epsilon, tables=tables, skip=skip)
    weights = {"query_weight": query_weight, "key_weight": key_weight}
    _check_norms(query, weights, {"query_bias": query_bias, "key_bias": key_bias}, preparation)
    _check_tables(query, key, cosine, sine, preparation)
    check_mask(mask, (key.shape[0], key.shape[1]), query.device)
    check_arithmetic(query, scale=scale, precision=precision)
    return preparation


def _check_projections(query: Tensor, key: Tensor, value: Tensor, heads: int) -> None:
    given = Given(query=query, key=key, value=value)
    if any(t.dim() != 3 or t.dtype not in DTYPES for t in (query, key, value)):
        raise ValueError(f"normed_attention takes [B, L, C] in bf16, fp16 or fp32, got {given}")
    if any(t.dtype != query.dtype or t.device != query.device for t in (key, value)):
        raise ValueError(f"normed_attention takes one type and device, got {given}")
    batch, _, channels = query.shape
    if value.shape != key.shape or (key.shape[0], key.shape[2]) != (batch, channels):
        raise ValueError(f"keys and values must share batch and channels, got {given}")
    if heads < 1 or channels % heads or channels // heads > MOST_WIDTH or channels > MOST_CHANNELS:
        raise ValueError(
            f"channels must be {heads} heads of equal width, at most {MOST_WIDTH} wide and "
            f"{MOST_CHANNELS} together, got {given}"
        )


def _check_norms(
    query: Tensor,
    weights: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    preparation: Preparation,
) -> None:
    kind, channels = preparation.kind, query.shape[2]
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown. Possible: {', '.join(KINDS)}.")
    if preparation.epsilon <= 0:
        raise ValueError(f"epsilon must be positive, got {preparation.epsilon}")
    is_across = kind == ACROSS_HEADS
    present = [bias for bias in biases.values() if bias is not None]
    given = Given(query=query, **weights, **biases)
    if len(present) != (0 if is_across else len(biases)):
        number = "no biases" if is_across else "two biases"
        raise ValueError(f"{kind} takes {number}, got {given}")
    expected = (channels if is_across else channels // preparation.heads,)
    for tensor in (*weights.values(), *present):
        fits = tensor.shape == expected and tensor.dtype in (query.dtype, torch.float32)
        if not fits or tensor.device != query.device:
            raise ValueError(
                f"{kind} takes weights {list(expected)} on {query.device}, in fp32 or the type of "
                f"the query, got {given}"
            )


def _check_tables(
    query: Tensor, key: Tensor, cosine: Tensor | None, sine: Tensor | None, preparation: Preparation
) -> None:
    skip = preparation.skip
    given = Given(query=query, key=key, cosine=cosine, sine=sine)
    if (cosine is None) != (sine is None) or (cosine is None and skip != 0):
        raise ValueError(f"turning takes cosine and sine, got {given}, skip {skip}")
    if cosine is None or sine is None:
        return
    batch, length, channels = query.shape
    width = channels // preparation.heads
    if width % 2 or key.shape[1] != length or not 0 <= skip <= length:
        raise ValueError(
            "turning takes heads of even width, as many keys as queries, and no longer a skip, got "
            f"{given}, {preparation.heads} heads, skip {skip}"
        )
    possible = ((length - skip, width // 2), (batch, length - skip, channels // 2))
    for table in (cosine, sine):
        fits = table.shape == possible[table.dim() == 3] and table.dtype in DTYPES
        if not fits or table.shape != cosine.shape or table.device != query.device:
            raise ValueError(
                f"tables must be {list(possible[0])} or {list(possible[1])} on {query.device}, "
                f"got {given}, skip {skip}"
            )


@declare("normed_attention")
def normed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    cosine: Tensor | None,
    sine: Tensor | None,
    mask: Tensor | None,
    heads: int,
    *,
    kind: str,
    epsilon: float,
    skip: int = 0,
    scale: float | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Normalise queries and keys, turn them, split heads, and attend.

    Shapes: query [B, L, C]; key, value [B, K, C], as they leave the projections; mask [B, K], true
    where a key counts; the answer [B, L, C], contiguous. A query that may see no key gives zeros.
    kind: "rms_norm_across_heads" (Wan, LTX) with weights [C], or "layer_norm", which is per head
    (CogVideoX), with weights and biases [D]; they are in fp32 or in the type of the query.
    cosine, sine: of the angles of channels 2i and 2i + 1, [L - skip, D / 2] for all heads (Wan,
    CogVideoX), [B, L - skip, C / 2] for each its own (LTX), or None (text). They need K = L.
    skip: how many first tokens are normalised, but not turned (CogVideoX's text).
    scale: D^-1/2 if none is given; it must be positive.
    precision: of the products in fp32, "ieee" or "tf32" (which the CPU computes as "ieee").
    Raises: ValueError for what does not fit; RuntimeError if a gradient is asked for, and on CUDA
    without Triton.
    """
    preparation = _checked(
        query,
        key,
        value,
        *(query_weight, query_bias, key_weight, key_bias),
        *(cosine, sine, mask, heads),
        kind=kind,
        epsilon=epsilon,
        skip=skip,
        scale=scale,
        precision=precision,
    )
    answer = attend(
        prepare(query, query_weight, query_bias, preparation=preparation),
        prepare(key, key_weight, key_bias, preparation=preparation),
        split_heads(value, heads),
        mask=mask,
        scale=scale,
        precision=precision,
    )
    return merge_heads(answer)


@normed_attention.register_fake
def _fake(query: Tensor, *rest: Any, **options: Any) -> Tensor:
    _checked(query, *rest, **options)
    return query.new_empty(query.shape)


refuse_gradients(normed_attention, "normed_attention")
