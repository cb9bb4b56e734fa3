"""The reference of the kernels against diffusers' own attention processors, in fp32."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewshot_rt.kernels import reference

HEADS, GRID, TEXT = 2, (3, 2, 5), 4
LENGTH = math.prod(GRID)
CLOSE = {"rtol": 0.0, "atol": 1e-6}


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield


def randomise(module: torch.nn.Module) -> Any:
    """Draw all weights anew: a norm's weights of one would hide where they go."""
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return module.eval()


def project(attn: Any, tokens: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attn.to_q(tokens), attn.to_k(context), attn.to_v(context)


def finish(attn: Any, split: Tensor) -> Tensor:
    return attn.to_out[0](reference.merge_heads(split))


def across_heads(norm: Any, packed: Tensor) -> Tensor:
    return reference.rms_norm(packed, norm.weight, epsilon=norm.eps)


def arange_grid() -> tuple[Tensor, Tensor, Tensor]:
    frames, height, width = (torch.arange(size) for size in GRID)
    return frames, height, width


def wan_attention(width: int, **options: Any) -> Any:
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

    sizes = {"heads": HEADS, "dim_head": width, "eps": 1e-6}
    return randomise(WanAttention(HEADS * width, **sizes, **options, processor=WanAttnProcessor()))


@pytest.mark.parametrize("width", [16, 40, 64])
def test_wan_normalises_across_heads_and_turns_each_head_alike(width: int) -> None:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    attn = wan_attention(width)
    tokens = torch.randn(2, LENGTH, HEADS * width)
    official_tables = WanRotaryPosEmbed(width, (1, 1, 1), 8)(torch.empty(1, 1, *GRID))
    tables = reference.rotary_tables(arange_grid(), reference.wan_widths(width))
    query, key, value = project(attn, tokens, tokens)
    query, key = across_heads(attn.norm_q, query), across_heads(attn.norm_k, key)
    query, key, value = (reference.split_heads(t, HEADS) for t in (query, key, value))
    query, key = reference.rotate(query, tables), reference.rotate(key, tables)
    found = finish(attn, reference.attention(query, key, value))
    torch.testing.assert_close(found, attn(tokens, None, None, official_tables), **CLOSE)


def test_wan_attends_to_text_without_turning() -> None:
    attn = wan_attention(32, cross_attention_dim_head=32)
    tokens, text = torch.randn(2, LENGTH, 64), torch.randn(2, TEXT, 64)
    query, key, value = project(attn, tokens, text)
    query, key = across_heads(attn.norm_q, query), across_heads(attn.norm_k, key)
    split = [reference.split_heads(t, HEADS) for t in (query, key, value)]
    found = finish(attn, reference.attention(*split))
    torch.testing.assert_close(found, attn(tokens, text, None, None), **CLOSE)


@pytest.mark.parametrize("grid_type", ["slice", "linspace"])
def test_cogvideox_normalises_each_head_and_leaves_text_unturned(grid_type: str) -> None:
    from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    width, processor = 64, CogVideoXAttnProcessor2_0()
    official = Attention(
        HEADS * width,
        heads=HEADS,
        dim_head=width,
        qk_norm="layer_norm",
        eps=1e-6,
        bias=True,
        processor=processor,
    )
    attn = randomise(official)
    video, text = torch.randn(2, LENGTH, HEADS * width), torch.randn(2, TEXT, HEADS * width)
    # CogVideoX 1.0 counts positions of a crop of its native grid, 1.5 from zero.
    corners = ((0, 0), GRID[1:]) if grid_type == "slice" else ((1, 2), (5, 9))
    official_tables = get_3d_rotary_pos_embed(
        width, corners, GRID[1:], GRID[0], grid_type=grid_type, max_size=(8, 8)
    )
    positions = list(arange_grid())
    if grid_type == "linspace":
        for axis in (1, 2):
            start, stop, size = corners[0][axis - 1], corners[1][axis - 1], GRID[axis]
            positions[axis] = torch.linspace(start, stop * (size - 1) / size, size)
    tables = reference.rotary_tables(tuple(positions), reference.cogvideox_widths(width))  # type: ignore[arg-type]
    tokens = torch.cat((text, video), dim=1)
    query, key, value = (reference.split_heads(t, HEADS) for t in project(attn, tokens, tokens))
    query, key = (
        reference.layer_norm(t, norm.weight, norm.bias, epsilon=norm.eps)
        for t, norm in ((query, attn.norm_q), (key, attn.norm_k))
    )
    query, key = (reference.rotate(t, tables, skip=TEXT) for t in (query, key))
    found = finish(attn, reference.attention(query, key, value))
    expected_video, expected_text = attn(video, text, image_rotary_emb=official_tables)
    expected = torch.cat((expected_text, expected_video), dim=1)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("width", [16, 64])
def test_ltx_turns_before_it_splits(width: int) -> None:
    from diffusers.models.transformers.transformer_ltx import LTXAttention, LTXVideoRotaryPosEmbed

    channels, scale = HEADS * width, (0.8, 32.0, 32.0)
    attn = randomise(LTXAttention(channels, heads=HEADS, kv_heads=HEADS, dim_head=width, bias=True))
    tokens = torch.randn(2, LENGTH, channels)
    official_tables = LTXVideoRotaryPosEmbed(channels)(tokens, *GRID, scale)
    grid = torch.stack(torch.meshgrid(*arange_grid(), indexing="ij"), dim=-1).view(1, LENGTH, 3)
    coordinates = grid * torch.tensor(scale) / torch.tensor([20, 2048, 2048])
    tables = reference.ltx_tables(coordinates, channels)
    query, key, value = project(attn, tokens, tokens)
    query, key = across_heads(attn.norm_q, query), across_heads(attn.norm_k, key)
    query, key = reference.rotate(query, tables), reference.rotate(key, tables)
    split = [reference.split_heads(t, HEADS) for t in (query, key, value)]
    found = finish(attn, reference.attention(*split))
    expected = attn(tokens, image_rotary_emb=official_tables)
    # LTX raises its angles, up to 15,000, to a power in fp32: that alone is an error of 1e-3.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-3)
    exact = tuple(t.float().repeat_interleave(2, -1).expand(2, -1, -1) for t in tables)
    torch.testing.assert_close(found, attn(tokens, image_rotary_emb=exact), **CLOSE)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_padded_text_does_not_count(scale: float | None) -> None:
    query, key, value = (torch.randn(2, HEADS, size, 16) for size in (5, 7, 7))
    mask = torch.arange(7)[None] < torch.tensor([[7], [3]])
    found = reference.attention(query, key, value, mask=mask, scale=scale)
    alone = reference.attention(query[1:], key[1:, :, :3], value[1:, :, :3], scale=scale)
    torch.testing.assert_close(found[1:], alone, **CLOSE)
    official = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[:, None, None, :], scale=scale
    )
    torch.testing.assert_close(found, official, **CLOSE)


def test_a_query_that_may_see_no_key_gives_zeros() -> None:
    query, key, value = (torch.randn(2, HEADS, 3, 16) for _ in range(3))
    mask = torch.tensor([[True] * 3, [False] * 3])
    assert (reference.attention(query, key, value, mask=mask)[1] == 0).all()


def test_half_precision_is_computed_in_fp32_and_fp64_stays() -> None:
    query, key, value = (torch.randn(1, 1, 4, 8) for _ in range(3))
    halves = reference.attention(query.half(), key.half(), value.half())
    assert halves.dtype is torch.float32
    assert reference.attention(query.double(), key.double(), value.double()).dtype is torch.float64
