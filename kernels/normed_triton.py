"""The kernel that prepares queries or keys in Triton: norm and rotary embedding in one pass.

Axes: B batch, N heads, L tokens, D head width, C = N D channels. A row is what is normalised as
one: a token's C channels (one group), or D of them (N groups).
"""

import triton
import triton.language as tl


@triton.jit
def _turn(
    normed,
    cosine,
    sine,
    cosine_pair,
    sine_pair,
    columns,
    is_turned,
    ROWS: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """Turn neighbouring channels by their angles; where `is_turned` is false, by none.

    Shapes: normed [ROWS, WIDTH_BLOCK]; cosine, sine pointers [ROWS, 1]; columns, is_turned
    [ROWS, WIDTH_BLOCK / 2].
    Source: Su et al. 2021, eq. 34.
    """
    cosines = tl.load(cosine + columns * cosine_pair, mask=is_turned, other=1.0).to(tl.float32)
    sines = tl.load(sine + columns * sine_pair, mask=is_turned, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(normed, [ROWS, WIDTH_BLOCK // 2, 2]))
    pairs = tl.join(even * cosines - odd * sines, even * sines + odd * cosines)
    return tl.reshape(pairs, [ROWS, WIDTH_BLOCK])


@triton.jit
def prepare_kernel(
    values,
    weight,
    bias,
    cosine,
    sine,
    out,
    values_batch,
    values_row,
    cosine_batch,
    cosine_row,
    cosine_pair,
    sine_batch,
    sine_row,
    sine_pair,
    length,
    skip,
    epsilon,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    PERIOD: tl.constexpr,
    ROWS: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    IS_TURNED: tl.constexpr,
):
    """Normalise each row, and turn its pairs of channels; everything in fp32, rounded once.

    Shapes: values, out [B, L, GROUPS WIDTH], out contiguous; weight, bias [WIDTH]; cosine, sine
    [L - skip, PERIOD] or [B, L - skip, PERIOD], and pairs begin anew in them after PERIOD. Strides
    are given in elements; the last axis of the values is dense.
    IS_CENTRED: layer norm with a bias, else the root mean square alone.
    Source: Ba et al. 2016, eq. 4 (layer norm); Zhang & Sennrich 2019, eq. 4 (root mean square).
    """
    # Inductor may pass numbers in fp64, and then all that they touch would be.
    epsilon = tl.cast(epsilon, tl.float32)
    blocks = tl.cdiv(length * GROUPS, ROWS)
    # What grows with the batch or the length is counted in 64 bits, places within a row in 32.
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    tokens, groups = (rows // GROUPS).to(tl.int64), rows % GROUPS
    channels = tl.arange(0, WIDTH_BLOCK)
    is_row = rows < length * GROUPS
    is_inside = is_row[:, None] & (channels < WIDTH)[None, :]

    places = values + batch * values_batch + tokens * values_row + groups * WIDTH
    normed = tl.load(places[:, None] + channels[None, :], mask=is_inside, other=0.0).to(tl.float32)
    if IS_CENTRED:
        mean = tl.sum(normed, 1) / WIDTH
        normed = tl.where(is_inside, normed - mean[:, None], 0.0)
    normed *= tl.rsqrt(tl.sum(normed * normed, 1) / WIDTH + epsilon)[:, None]
    normed *= tl.load(weight + channels, mask=channels < WIDTH, other=0.0).to(tl.float32)[None, :]
    if IS_CENTRED:
        normed += tl.load(bias + channels, mask=channels < WIDTH, other=0.0).to(tl.float32)[None, :]

    if IS_TURNED:
        pairs = tl.arange(0, WIDTH_BLOCK // 2)
        turns = tokens - skip
        normed = _turn(
            normed,
            (cosine + batch * cosine_batch + turns * cosine_row)[:, None],
            (sine + batch * sine_batch + turns * sine_row)[:, None],
            cosine_pair,
            sine_pair,
            (groups * (WIDTH // 2) % PERIOD)[:, None] + (pairs % PERIOD)[None, :],
            (is_row & (turns >= 0))[:, None] & (pairs < WIDTH // 2)[None, :],
            ROWS,
            WIDTH_BLOCK,
        )
    out += (batch * length * GROUPS + rows) * WIDTH
    tl.store(out[:, None] + channels[None, :], normed.to(out.dtype.element_ty), mask=is_inside)
