"""What the swap takes for a norm, a rotary embedding or heads, what it leaves, what it refuses.

Reference: the module that a graph was captured from. Whatever a layer looks like, the swapped graph
must give the same; what only looks like a pattern must be left to `attention` alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import relative
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from fewshot_rt.kernels.swap import SDPA, Site, swap_attention

HEADS, WIDTH, LENGTH, TEXT = 3, 8, 6, 2
CHANNELS = HEADS * WIDTH
PLAIN = torch.ops.fewshot_rt.attention.default
NORMED = torch.ops.fewshot_rt.normed_attention.default
EXACT = 1e-6
SIZES = {"query": CHANNELS, "key": CHANNELS, "width": WIDTH, "width_bias": WIDTH}


class Layer(nn.Module):
    """Projections, weights of norms and tables, and what is done with them.

    Shapes: halves [L, D / 2]; wholes [L, D], each value twice; wide [1, L, C], each value twice.
    """

    def __init__(self, attend: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.attend, self.options = attend, options
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(CHANNELS, CHANNELS) for _ in range(4)
        )
        self.weights = nn.ParameterDict({name: torch.randn(size) for name, size in SIZES.items()})
        self.register_buffer("angles", torch.randn(LENGTH, CHANNELS // 2))

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.to_q(x), self.to_k(x), self.to_v(x)

    def halves(self) -> tuple[Tensor, Tensor]:
        angles = self.angles[:, : WIDTH // 2]
        return angles.cos(), angles.sin()

    def wholes(self, start: int = 0) -> tuple[Tensor, Tensor]:
        cosine, sine = (t[start:].repeat_interleave(2, dim=1) for t in self.halves())
        return cosine, sine

    def wide(self) -> tuple[Tensor, Tensor]:
        cosine, sine = (
            t.repeat_interleave(2, dim=-1)[None] for t in (self.angles.cos(), self.angles.sin())
        )
        return cosine, sine

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.attend(self, x, **self.options))


def apart(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def across(layer: Layer, x: Tensor, name: str, eps: float | None = 1e-6) -> Tensor:
    return rms_norm(x, (CHANNELS,), layer.weights[name], eps)


def each(layer: Layer, x: Tensor, eps: float = 1e-6) -> Tensor:
    return layer_norm(x, (WIDTH,), layer.weights["width"], layer.weights["width_bias"], eps)


def by_halves(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * cosine - odd * sine, even * sine + odd * cosine)
    return torch.stack(turned, dim=-1).flatten(-2)


def by_wholes(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack((-odd, even), dim=-1).flatten(-2) * sine


def wan(layer: Layer, x: Tensor, *, change: Any = None, name: str = "") -> Tensor:
    """Wan's attention, in which a part may be another."""
    parts: dict[str, Any] = {
        "norm": across,
        "tables": lambda layer: (by_token(*layer.halves()),) * 2,
        "turn": by_halves,
        "finish": lambda layer, q, k, v: together(scaled_dot_product_attention(q, k, v)),
    }
    parts |= {name: change} if name else {}
    q, k, v = layer.projections(x)
    q, k = (parts["norm"](layer, t, which) for t, which in ((q, "query"), (k, "key")))
    q, k, v = (t.unflatten(2, (HEADS, -1)) for t in (q, k, v))
    tables = parts["tables"](layer)
    q, k = (parts["turn"](t, *pair) for t, pair in zip((q, k), tables, strict=True))
    found: Tensor = parts["finish"](layer, *(t.transpose(1, 2) for t in (q, k, v)))
    return found


def ltx(
    layer: Layer, x: Tensor, *, tables: Any = Layer.wide, turn: Any = by_wholes, heads: int = HEADS
) -> Tensor:
    """LTX's attention, with tables or an embedding that may be others."""
    cosine, sine = tables(layer)
    q, k, v = layer.projections(x)
    q = turn(across(layer, q, "query"), cosine, sine)
    k = turn(across(layer, k, "key"), cosine, sine)
    return together(scaled_dot_product_attention(*(apart(t, heads) for t in (q, k, v))))


def cogvideox(
    layer: Layer, x: Tensor, *, write: Any = slice(TEXT, None), read: Any = None, late: str = ""
) -> Tensor:
    """CogVideoX's attention, in which places may be others, and reading or writing late."""
    q, k, v = (apart(t) for t in layer.projections(x))
    q, k = each(layer, q), each(layer, k)
    first = q[:, :, read or write]
    early = together(scaled_dot_product_attention(q, k, v)) if late == "written" else None
    tables = layer.wholes(TEXT)
    for t in (q, k):
        t[:, :, write] = by_wholes(t[:, :, read or write], *(u[None, None] for u in tables))
    if early is not None:
        return early
    found = together(scaled_dot_product_attention(q, k, v))
    return found * first.mean() if late == "read" else found


def heads_normed(layer: Layer, x: Tensor) -> Tensor:
    """Attention whose heads each have an RMS norm of their own."""
    q, k, v = (apart(t) for t in layer.projections(x))
    q, k = (rms_norm(t, (WIDTH,), layer.weights["width"], 1e-6) for t in (q, k))
    return together(scaled_dot_product_attention(q, k, v))


def capture(module: nn.Module, *tensors: Tensor, batch: Any = None) -> ExportedProgram:
    shapes = None if batch is None else tuple({0: batch} for _ in tensors)
    with torch.no_grad():
        return torch.export.export(module, tensors, dynamic_shapes=shapes, strict=False)


@torch.no_grad()
def swap(module: nn.Module, *tensors: Tensor, **options: Any) -> tuple[Site, ...]:
    """Swap what a module is captured to, and require that it gives the same."""
    exported = capture(module, *tensors)
    sites = swap_attention(exported.graph_module, **options)
    exported.graph.lint()
    assert SDPA not in [node.target for node in exported.graph.nodes]
    assert relative(exported.module()(*tensors), module(*tensors)) < EXACT
    return sites


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, LENGTH, CHANNELS)


def bare(layer: Layer, x: Tensor) -> Tensor:
    """Attention with norms alone, whose outcome stays apart and whose queries are read twice."""
    q, k, v = layer.projections(x)
    q, k = apart(across(layer, q, "query")), apart(across(layer, k, "key"))
    found = scaled_dot_product_attention(q, k, apart(v), scale=0.3) * 2
    return together(found) + together(q)


def twice(layer: Layer, x: Tensor) -> Tensor:
    """Attention whose queries, keys and values are the outcome of another."""
    first = wan(layer, x)
    q, k = apart(across(layer, first, "query")), apart(across(layer, first, "key"))
    return together(scaled_dot_product_attention(q, k, apart(first)))


def padded(layer: Layer, x: Tensor) -> Tensor:
    """LTX's tables: what six does not divide stays unturned, in front."""

    def tables(layer: Layer) -> tuple[Tensor, Tensor]:
        angles = layer.angles[:, 2:]
        cosine, sine = (t.repeat_interleave(2, dim=-1)[None] for t in (angles.cos(), angles.sin()))
        fill = (torch.ones_like(cosine[..., :4]), torch.zeros_like(cosine[..., :4]))
        return torch.cat((fill[0], cosine), dim=-1), torch.cat((fill[1], sine), dim=-1)

    return ltx(layer, x, tables=tables)


def by_token(*tables: Tensor) -> tuple[Tensor, ...]:
    return tuple(table[None, :, None] for table in tables)


def exchanged_tables(layer: Layer) -> tuple[tuple[Tensor, ...], ...]:
    return (by_token(*reversed(layer.halves())),) * 2


UNDERSTOOD = {
    "wan": (wan, {}),
    "ltx": (ltx, {}),
    "padded": (padded, {}),
    "cogvideox": (cogvideox, {}),
    "written later": (cogvideox, {"late": "written"}),
    "bare": (bare, {}),
    "exchanged tables": (wan, {"name": "tables", "change": exchanged_tables}),
}


@pytest.mark.parametrize(("attend", "options"), UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_patterns_are_taken_over(attend: Any, options: Any, x: Tensor) -> None:
    (site,) = swap(Layer(attend, **options), x)
    assert site.is_normed
    (site,) = swap(Layer(attend, **options), x, normed=False)
    assert not site.is_normed


def test_attention_may_be_of_what_attention_gave(x: Tensor) -> None:
    assert [site.is_normed for site in swap(Layer(twice), x)] == [True, True]


def test_everything_fits_at_all_batches(x: Tensor) -> None:
    for attend in (wan, ltx, cogvideox):
        module = Layer(attend)
        exported = capture(module, x, batch=Dim("batch", min=1, max=8))
        (site,) = swap_attention(exported.graph_module)
        assert site.is_normed
        for batch in (1, 2, 5):
            given = torch.randn(batch, LENGTH, CHANNELS)
            with torch.no_grad():
                assert relative(exported.module()(given), module(given)) < EXACT


# Norms that are not those of the kernel.
NORMS: dict[str, Any] = {
    "other epsilon": lambda m, x, n: across(m, x, n, 1e-6 if n == "query" else 1e-5),
    "epsilon of the type": lambda m, x, n: across(m, x, n, None),
    "no weight": lambda m, x, n: rms_norm(x, (CHANNELS,), None, 1e-6),
    "centred across heads": lambda m, x, n: layer_norm(x, (CHANNELS,), *[m.weights[n]] * 2, 1e-6),
    "scaled after": lambda m, x, n: across(m, x, n) * 2,
    "rounded after": lambda m, x, n: across(m, x, n).half().float(),
    "one of two": lambda m, x, n: across(m, x, n) if n == "query" else x,
    "changed after": lambda m, x, n: (across(m, x, n), x.mul_(3))[0],
}
# Rotary tables that are none, or of which not every head and batch has the same.
TABLES: dict[str, Any] = {
    "other keys": lambda t: (by_token(*t), by_token(*(u.roll(1, 0) for u in t))),
    "exchanged for keys": lambda t: (by_token(*t), by_token(*reversed(t))),
    "other sines": lambda t: (by_token(*t), by_token(t[0], t[1].roll(1, 0))),
    "by batch": lambda t: (tuple(torch.stack((u, u.roll(1, 0)))[:, :, None] for u in t),) * 2,
    "by head": lambda t: (tuple(torch.stack((u, u.roll(1, 0), u), 1)[None] for u in t),) * 2,
}


def turn_back(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * cosine + odd * sine, odd * cosine - even * sine)
    return torch.stack(turned, dim=-1).flatten(-2)


def turn_far(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


def turn_odd_first(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    odd, even = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * cosine - odd * sine, even * sine + odd * cosine)
    return torch.stack(turned, dim=-1).flatten(-2)


def turn_twofold(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (torch.sub(even * cosine, odd * sine, alpha=2), even * sine + odd * cosine)
    return torch.stack(turned, dim=-1).flatten(-2)


def turn_otherwise(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * cosine - odd * sine, even * sine + odd * cosine.square())
    return torch.stack(turned, dim=-1).flatten(-2)


def turn_others(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = (t.unflatten(-1, (-1, 2)).unbind(-1)[i] for i, t in enumerate((x, x.roll(1, 1))))
    turned = (even * cosine - odd * sine, even * sine + odd * cosine)
    return torch.stack(turned, dim=-1).flatten(-2)


def whole_odd_first(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    odd, even = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack((-odd, even), dim=-1).flatten(-2) * sine


def whole_of_others(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x.roll(1, 1).unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack((-odd, even), dim=-1).flatten(-2) * sine


TURNS = (turn_back, turn_far, turn_odd_first, turn_twofold, turn_otherwise, turn_others)
WHOLES = (whole_odd_first, whole_of_others)
FINISHES: dict[str, Any] = {
    "values scaled": lambda m, q, k, v: together(scaled_dot_product_attention(q, k, v * 2)),
    "queries scaled": lambda m, q, k, v: together(scaled_dot_product_attention(q * 2, k, v)),
    "heads the other way": lambda m, q, k, v: together(
        scaled_dot_product_attention(
            q, k, v.transpose(1, 2).flatten(2).unflatten(2, (WIDTH, HEADS)).permute(0, 3, 1, 2)
        )
    ),
}


def unpaired(layer: Layer) -> tuple[Tensor, ...]:
    angles = torch.cat((layer.angles, layer.angles), dim=1)
    return angles.cos()[None], angles.sin()[None]


def shifted(layer: Layer) -> tuple[Tensor, ...]:
    angles = layer.angles[:, 1:].repeat_interleave(2, dim=-1)
    edge = torch.ones_like(angles[:, :1])
    angles = torch.cat((edge, angles, edge), dim=1)
    return angles[None], angles[None]


def picked(layer: Layer) -> tuple[Tensor, ...]:
    places = torch.arange(CHANNELS).roll(1)
    return tuple(table.index_select(2, places) for table in layer.wide())


def paired_tokens(layer: Layer) -> tuple[Tensor, ...]:
    angles = layer.angles.reshape(LENGTH // 2, CHANNELS).repeat_interleave(2, dim=0)
    return angles[None], angles[None]


def threefold(layer: Layer) -> tuple[Tensor, ...]:
    angles = layer.angles[:, : CHANNELS // 3].repeat_interleave(3, dim=-1)
    return angles[None], angles[None]


def changed(layer: Layer) -> tuple[Tensor, ...]:
    cosine, sine = layer.wide()
    cosine[..., :3].mul_(2)
    return cosine, sine


def tables_by(change: Any) -> Any:
    return lambda layer: change(layer.halves())


WIDE = (unpaired, shifted, picked, paired_tokens, threefold, changed)
PLACES: dict[str, Any] = {
    "elsewhere": {"write": slice(1, 5), "read": slice(2, None)},
    "not the last": {"write": slice(None, 4)},
    "read later": {"late": "read"},
}
NEAR = {
    **{name: (wan, {"name": "norm", "change": change}) for name, change in NORMS.items()},
    **{name: (wan, {"name": "tables", "change": tables_by(c)}) for name, c in TABLES.items()},
    **{turn.__name__: (wan, {"name": "turn", "change": turn}) for turn in TURNS},
    **{name: (wan, {"name": "finish", "change": change}) for name, change in FINISHES.items()},
    **{turn.__name__: (ltx, {"turn": turn}) for turn in WHOLES},
    **{tables.__name__: (ltx, {"tables": tables}) for tables in WIDE},
    **{name: (cogvideox, options) for name, options in PLACES.items()},
    "odd heads": (ltx, {"heads": CHANNELS // 3}),
    "heads normed": (heads_normed, {}),
}


@pytest.mark.parametrize(("attend", "options"), NEAR.values(), ids=NEAR)
def test_what_only_looks_like_a_pattern_is_left(attend: Any, options: Any, x: Tensor) -> None:
    (site,) = swap(Layer(attend, **options), x)
    assert not site.is_normed
