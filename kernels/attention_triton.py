"""The attention kernel in Triton: one program for one block of queries of one head.

Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width.
"""

import triton
import triton.language as tl


@triton.jit
def _add_keys(
    weighted,
    total,
    greatest,
    queries,
    key_places,
    value_places,
    mask_places,
    left,
    scale_log2,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    IS_EDGE: tl.constexpr,
    IS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take one block of keys into the running softmax; at the edge only `left` of them count."""
    columns = tl.arange(0, KEY_BLOCK)
    channels = tl.arange(0, WIDTH_BLOCK)
    # What lies beyond the edge may be anything: 0 x NaN would be NaN, so it is read as zeros.
    if IS_EDGE:
        is_inside = (columns < left)[:, None] & (channels < WIDTH)[None, :]
        keys = tl.load(key_places, mask=is_inside, other=0.0)
        values = tl.load(value_places, mask=is_inside, other=0.0)
    elif WIDTH < WIDTH_BLOCK:
        is_inside = (channels < WIDTH)[None, :]
        keys = tl.load(key_places, mask=is_inside, other=0.0)
        values = tl.load(value_places, mask=is_inside, other=0.0)
    else:
        keys = tl.load(key_places)
        values = tl.load(value_places)

    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if IS_MASKED:
        counts = tl.load(mask_places, mask=columns < left, other=0) != 0
        scores = tl.where(counts[None, :], scores, float("-inf"))
    elif IS_EDGE:
        scores = tl.where((columns < left)[None, :], scores, float("-inf"))

    # The scale is positive, so the greatest score stays the greatest.
    rising = tl.maximum(greatest, tl.max(scores, 1) * scale_log2)
    anchor = rising
    if IS_MASKED:
        # A query that has seen no key yet: -inf less -inf would be NaN.
        anchor = tl.where(rising == float("-inf"), 0.0, rising)
    weights = tl.exp2(scores * scale_log2 - anchor[:, None])
    fading = tl.exp2(greatest - anchor)
    total = total * fading + tl.sum(weights, 1)
    weighted = tl.dot(
        weights.to(values.dtype),
        values,
        weighted * fading[:, None],
        input_precision=PRECISION,
    )
    return weighted, total, rising


@triton.jit
def attention_kernel(
    query,
    key,
    value,
    mask,
    out,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    mask_batch,
    out_batch,
    out_head,
    out_row,
    heads,
    query_length,
    key_length,
    scale_log2,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend: softmax(query key^T scale) value, one block of queries a program.

    Shapes: query, out [B, N, L, D]; key, value [B, N, K, D]; mask [B, K]. The last axis is dense;
    the other strides are given in elements.
    scale_log2: the scale times log2(e), since the softmax is taken in base 2.
    Source: Dao 2023 (FlashAttention-2), algorithm 1.
    """
    # Inductor may pass numbers in fp64, and then all that they touch would be.
    scale_log2 = tl.cast(scale_log2, tl.float32)
    blocks = tl.cdiv(query_length, QUERY_BLOCK)
    # Programs that run side by side share a head, so that its keys and values stay in the cache.
    pair = tl.program_id(0) // blocks
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = (tl.program_id(0) % blocks) * QUERY_BLOCK
    rows = tl.arange(0, QUERY_BLOCK)
    columns = tl.arange(0, KEY_BLOCK)
    channels = tl.arange(0, WIDTH_BLOCK)

    is_inside = (first + rows < query_length)[:, None] & (channels < WIDTH)[None, :]
    # Where a block starts is counted in 64 bits, places within it in 32.
    query += batch * query_batch + head * query_head + first.to(tl.int64) * query_row
    queries = tl.load(query + rows[:, None] * query_row + channels, mask=is_inside, other=0.0)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    key_places = key + columns[:, None] * key_row + channels[None, :]
    value_places = value + columns[:, None] * value_row + channels[None, :]
    mask_places = mask + batch * mask_batch + columns

    weighted = tl.zeros([QUERY_BLOCK, WIDTH_BLOCK], tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    greatest = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    # Whole blocks need no bounds; a second copy of the loop's body, for the edge, takes registers.
    whole = key_length // KEY_BLOCK * KEY_BLOCK if IS_SPLIT else key_length
    for start in range(0, whole, KEY_BLOCK):
        weighted, total, greatest = _add_keys(
            weighted,
            total,
            greatest,
            queries,
            key_places,
            value_places,
            mask_places,
            key_length - start,
            scale_log2,
            WIDTH,
            WIDTH_BLOCK,
            KEY_BLOCK,
            not IS_SPLIT,
            IS_MASKED,
            PRECISION,
        )
        key_places += KEY_BLOCK * key_row
        value_places += KEY_BLOCK * value_row
        mask_places += KEY_BLOCK
    if IS_SPLIT and whole < key_length:
        weighted, total, greatest = _add_keys(
            weighted,
            total,
            greatest,
            queries,
            key_places,
            value_places,
            mask_places,
            key_length - whole,
            scale_log2,
            WIDTH,
            WIDTH_BLOCK,
            KEY_BLOCK,
            True,
            IS_MASKED,
            PRECISION,
        )

    # A query that may see no key has a total of zero, and gives zeros.
    weighted = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
    out += batch * out_batch + head * out_head + first.to(tl.int64) * out_row
    places = out + rows[:, None] * out_row + channels[None, :]
    tl.store(places, weighted.to(out.dtype.element_ty), mask=is_inside)
