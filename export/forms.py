"""Weights in few bits, and linear layers that take them.

A form says what is made of a weight once, in fp32; a layer rounds its tokens at each call. In 8
bits there is one scale for each token and one for each output channel, by the greatest magnitude.

Axes: M tokens, K channels in, N channels out.
Source: Dettmers et al. 2022 (LLM.int8(), sec. 2); Micikevicius et al. 2022 (e4m3).
"""

from collections.abc import Callable

import torch
from torch import Tensor

PLAIN = "plain"  # fp32, or whatever it is if it is no fraction
# Greatest value of e4m3, and of int8 without the one that has no opposite.
FP8_MOST, INT8_MOST = 448.0, 127.0
# A scale of zero would divide by zero; tokens of zeros stay zeros with any other.
LEAST_SCALE = 1e-12


def derive(weight: Tensor, form: str) -> Tensor:
    """Give a weight in a form of `FORMS`. Shapes: weight [N, K] in 8 bits, else any."""
    return FORMS[form](weight)


def int8_linear(tokens: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in int8, sum in int32, and give the type of the tokens.

    Shapes: tokens [..., K]; weight [N, K] in int8; scale [N]; result [..., N].
    """
    rows = tokens.flatten(0, -2).float()
    row_scale = _scale(rows, INT8_MOST)
    small = (rows / row_scale).round().to(torch.int8)
    product = torch._int_mm(small, weight.t()).float() * row_scale * scale
    return _finish(product, bias, tokens)


def fp8_linear(tokens: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in e4m3, sum as tensor cores do fastest, round to bf16, give the tokens' type.

    Shapes: as for `int8_linear`, K and N multiples of 16.
    """
    rows = tokens.flatten(0, -2).float()
    row_scale = _scale(rows, FP8_MOST)
    small = (rows / row_scale).to(torch.float8_e4m3fn)
    product = torch._scaled_mm(
        small,
        weight.t(),
        scale_a=row_scale,
        scale_b=scale[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return _finish(product.float(), bias, tokens)


def _finish(product: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    if bias is not None:
        product = product + bias
    return torch.unflatten(product, 0, tokens.shape[:-1]).to(tokens.dtype)


def _scale(rows: Tensor, most: float) -> Tensor:
    """Give the scale of each row, by which its greatest value becomes `most`. Shapes: [M, 1]."""
    return rows.abs().amax(-1, keepdim=True).clamp(min=LEAST_SCALE) / most


def _weight_scale(weight: Tensor, most: float) -> Tensor:
    return _scale(weight.float(), most)[:, 0]


def _to_int8(weight: Tensor) -> Tensor:
    return (weight.float() / _scale(weight.float(), INT8_MOST)).round().to(torch.int8)


def _to_fp8(weight: Tensor) -> Tensor:
    return (weight.float() / _scale(weight.float(), FP8_MOST)).to(torch.float8_e4m3fn)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    PLAIN: lambda weight: weight.float() if weight.is_floating_point() else weight,
    "bf16": lambda weight: weight.to(torch.bfloat16),
    "fp16": lambda weight: weight.to(torch.float16),
    "int8": _to_int8,
    "int8 scale": lambda weight: _weight_scale(weight, INT8_MOST),
    "fp8": _to_fp8,
    "fp8 scale": lambda weight: _weight_scale(weight, FP8_MOST),
}
LINEAR = {"int8": int8_linear, "fp8": fp8_linear}
