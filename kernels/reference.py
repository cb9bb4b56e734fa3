"""What the kernels must give: attention and what stands before it, in plain torch.

Everything is computed in fp32, or in fp64 where the first tensor is fp64, and stays so: a caller
rounds the outcome itself.

Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width, C = N D.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

Tables = tuple[Tensor, Tensor]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Give softmax(query key^T scale) value; a query that may see no key gives zeros.

    Shapes: query [B, N, L, D]; key, value [B, N, K, D]; mask [B, K], true where a key counts.
    scale: D^-1/2 if none is given.
    Source: Vaswani et al. 2017, eq. 1.
    """
    query, key, value = _exact(query), _exact(key), _exact(value)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        return scores.softmax(-1) @ value
    is_hidden = ~mask[:, None, None, :]
    weights = scores.masked_fill(is_hidden, -math.inf).softmax(-1)
    return weights.masked_fill(is_hidden, 0.0) @ value


def split_heads(packed: Tensor, heads: int) -> Tensor:
    """Give [B, N, L, D] for [B, L, C]."""
    return packed.reshape(*packed.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(split: Tensor) -> Tensor:
    """Give [B, L, C] for [B, N, L, D]."""
    return split.transpose(1, 2).flatten(2)


def rms_norm(values: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """Divide the last axis by its root mean square, and multiply with the weight.

    Wan and LTX do so across heads, before they split [B, L, C].
    Source: Zhang & Sennrich 2019, eq. 4.
    """
    values = _exact(values)
    mean_square = values.square().mean(-1, keepdim=True)
    return values * torch.rsqrt(mean_square + epsilon) * _exact(weight)


def layer_norm(values: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    """Bring the last axis to mean 0 and variance 1, then to weight and bias.

    CogVideoX does so per head, after it has split: on [B, N, L, D].
    Source: Ba et al. 2016, eq. 4.
    """
    values = _exact(values)
    centred = values - values.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + epsilon) * _exact(weight) + _exact(bias)


def rotate(values: Tensor, tables: Tables, *, skip: int = 0) -> Tensor:
    """Turn each pair of neighbouring channels by its angle.

    All families pair channels 2i and 2i + 1. Wan turns each head by the same tables [L, D / 2];
    CogVideoX too, but leaves its first tokens, the text, alone (skip); LTX turns [B, L, C] before
    it splits, by tables [B, L, C / 2], so that its heads differ.
    Shapes: values [..., skip + L, D]; tables [..., L, D / 2], for cosine and sine.
    Source: Su et al. 2021, eq. 34.
    """
    values = _exact(values)
    cosine, sine = (table.to(values.dtype) for table in tables)
    left, turned = values[..., :skip, :], values[..., skip:, :]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return torch.cat((left, pairs.flatten(-2)), dim=-2)


def rotary_tables(
    positions: tuple[Tensor, Tensor, Tensor], widths: tuple[int, int, int], *, theta: float = 1e4
) -> Tables:
    """Give cosine and sine for tokens on a grid, as Wan and CogVideoX have them.

    The channels of a head are shared out among the axes; those of one axis are turned by its
    position, ever more slowly: theta^(-2i / width).
    Shapes: positions [T], [h], [w]; tables [T h w, D / 2], D being the sum of the widths.
    """
    sizes = tuple(len(axis) for axis in positions)
    angles = []
    for number, (axis, width) in enumerate(zip(positions, widths, strict=True)):
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        table = axis.double()[:, None] * theta**-exponents
        shape = [1, 1, 1, width // 2]
        shape[number] = len(axis)
        angles.append(table.view(shape).expand(*sizes, width // 2))
    joined = torch.cat(angles, dim=-1).flatten(0, 2)
    return joined.cos(), joined.sin()


def wan_widths(width: int) -> tuple[int, int, int]:
    """Share the channels of a head out among time, height and width, as Wan does."""
    space = 2 * (width // 6)
    return width - 2 * space, space, space


def cogvideox_widths(width: int) -> tuple[int, int, int]:
    """Share the channels of a head out among time, height and width, as CogVideoX does."""
    return width // 4, width // 8 * 3, width // 8 * 3


def ltx_tables(coordinates: Tensor, channels: int, *, theta: float = 1e4) -> Tables:
    """Give cosine and sine for tokens at coordinates, as LTX has them: across all heads.

    Frequencies grow from pi / 2 to theta pi / 2; at each, the three axes take turns. What six does
    not divide stays unturned, in front.
    Shapes: coordinates [B, L, 3], fractions of the greatest video; tables [B, L, C / 2].
    """
    frequencies = theta ** torch.linspace(0, 1, channels // 6, dtype=torch.float64) * math.pi / 2
    angles = frequencies[:, None] * (2 * coordinates.double()[..., None, :] - 1)
    angles = functional.pad(angles.flatten(2), (channels // 2 - 3 * (channels // 6), 0))
    return angles.cos(), angles.sin()


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()
