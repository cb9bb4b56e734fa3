"""Which attentions the swap takes, with which masks, and what it refuses by the node's name.

Reference: the module that a graph was captured from.
"""

from typing import Any

import pytest
import torch
from tiny import relative
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from fewshot_rt.kernels.swap import SDPA, find_attention, swap_attention

HEADS, WIDTH, LENGTH = 3, 8, 6
CHANNELS = HEADS * WIDTH
PLAIN = torch.ops.fewshot_rt.attention.default
NORMED = torch.ops.fewshot_rt.normed_attention.default
EXACT = 1e-6


def apart(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Attention between linear layers, with norms if it has them; options are of torch's."""

    def __init__(self, *, has_norms: bool, **options: Any) -> None:
        super().__init__()
        self.has_norms, self.options = has_norms, options
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(CHANNELS, CHANNELS) for _ in range(4)
        )
        self.weight = nn.Parameter(torch.randn(CHANNELS))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(text), self.to_v(text)
        if self.has_norms:
            q, k = (rms_norm(t, (CHANNELS,), self.weight, 1e-6) for t in (q, k))
        split = (apart(t) for t in (q, k, v))
        found = scaled_dot_product_attention(*split, attn_mask=mask, **self.options)
        return self.to_out(found.transpose(1, 2).flatten(2))


class Several(nn.Module):
    """Three attentions, the last of which looks one way only, if it does."""

    def __init__(self, *, is_last_causal: bool = False) -> None:
        super().__init__()
        self.first, self.second = Attention(has_norms=True), Attention(has_norms=True)
        self.last = Attention(has_norms=False, is_causal=is_last_causal)

    def forward(self, x: Tensor) -> Tensor:
        short = x[:, :3]
        found = self.first(x, x)[:, :3] + self.second(short, short)
        return self.last(found, found)


def capture(module: nn.Module, *tensors: Tensor) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, tensors, strict=False)


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, LENGTH, CHANNELS)


@torch.no_grad()
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("is_shared", [False, True])
def test_masks_of_keys_are_taken(has_norms: bool, is_shared: bool, x: Tensor) -> None:
    module, batch = Attention(has_norms=has_norms, scale=0.3), Dim("batch", min=1, max=8)
    text = torch.randn(2, 5, CHANNELS)
    mask = torch.arange(5)[None, None, None] < torch.tensor([4, 2])[:, None, None, None]
    shapes = ({0: batch}, {0: batch}, {} if is_shared else {0: batch})
    given = (x, text, mask[:1] if is_shared else mask)
    exported = torch.export.export(module, given, dynamic_shapes=shapes, strict=False)
    (site,) = swap_attention(exported.graph_module)
    assert (site.is_masked, site.is_normed) == (True, has_norms)
    assert (site.length, site.key_length, site.heads, site.width) == (LENGTH, 5, HEADS, WIDTH)
    expected, found = module(*given), exported.module()(*given)
    assert relative(found, expected) < EXACT
    assert relative(found, module(x, text, torch.ones_like(given[2]))) > 1e-3
    first = [t[:1] for t in given]
    assert relative(exported.module()(*first), expected[:1]) < EXACT


class Bare(nn.Module):
    """Attention as it is called, and nothing else."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, *tensors: Tensor) -> Tensor:
        mask = {"attn_mask": tensors[3]} if len(tensors) > 3 else {}
        return scaled_dot_product_attention(*tensors[:3], **mask, **self.options) * 2


def heads(*shape: int) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(3)]


Q, K, V = heads(2, 4, 5, 16)


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        ([Q, K, V], {"is_causal": True}, "looks one way only"),
        ([Q, K, V], {"dropout_p": 0.1}, "drops weights"),
        ([Q, K[:, :2], V[:, :2]], {"enable_gqa": True}, "fewer heads of keys"),
        ([Q, K, V, torch.zeros(2, 1, 1, 5)], {}, r"float32 \[2, 1, 1, 5\], is not bool"),
        ([Q, K, V, torch.ones(2, 1, 5, 5).bool()], {}, r"\[2, 1, 5, 5\], is not bool"),
        ([Q, K, V, torch.ones(2, 4, 1, 5).bool()], {}, r"\[2, 4, 1, 5\], is not bool"),
        ([Q, K, V, torch.ones(2, 1, 1, 1).bool()], {}, r"\[2, 1, 1, 1\], is not bool"),
        ([Q, K, V, torch.ones(5, 5).bool()], {}, r"\[5, 5\], is not bool"),
        (heads(2, 1, 5, 136), {}, "136 and 136 wide"),
        ([Q, K, V[..., :8]], {}, "16 and 8 wide"),
        (heads(2, 5, 16), {}, "3 axes"),
        ([t.double() for t in (Q, K, V)], {}, "float64 is not among"),
        ([Q, K[:1], V[:1]], {}, "one batch and number of heads"),
        ([Q, K, V], {"scale": -1.0}, "scale is -1"),
    ],
)
def test_what_no_kernel_can_do_is_refused_by_name(tensors: Any, options: Any, reason: str) -> None:
    exported = capture(Bare(options), *tensors)
    (name,) = (node.name for node in exported.graph.nodes if node.target is SDPA)
    before = str(exported.graph)
    for change in (find_attention, swap_attention):
        with pytest.raises(ValueError, match=f"attention '{name}' cannot be replaced: .*{reason}"):
            change(exported.graph_module)
    assert str(exported.graph) == before


def test_only_what_suits_is_replaced(x: Tensor) -> None:
    module = Several()
    exported = capture(module, x)
    before = str(exported.graph)
    assert swap_attention(exported.graph_module, suits=lambda site: False) == ()
    assert str(exported.graph) == before
    sites = find_attention(exported.graph_module)
    assert [(site.length, site.is_normed) for site in sites] == [(6, True), (3, True), (3, False)]
    chosen = swap_attention(exported.graph_module, suits=lambda site: site.length == 3)
    assert chosen == sites[1:]
    targets = [node.target for node in exported.graph.nodes]
    assert [targets.count(target) for target in (SDPA, PLAIN, NORMED)] == [1, 1, 1]
    with torch.no_grad():
        assert relative(exported.module()(x), module(x)) < EXACT
    assert find_attention(exported.graph_module) == sites[:1]


def test_a_graph_is_changed_whole_or_not_at_all(x: Tensor) -> None:
    exported = capture(Several(is_last_causal=True), x)
    before = str(exported.graph)
    with pytest.raises(ValueError, match="'scaled_dot_product_attention_2' cannot be replaced"):
        swap_attention(exported.graph_module)
    assert str(exported.graph) == before


@pytest.mark.parametrize("has_norms", [False, True])
def test_the_precision_is_handed_on(has_norms: bool, x: Tensor) -> None:
    exported = capture(Attention(has_norms=has_norms), x, x)
    swap_attention(exported.graph_module, precision="tf32")
    (node,) = (n for n in exported.graph.nodes if n.target in (PLAIN, NORMED))
    assert "tf32" in (*node.args, *node.kwargs.values())


@torch.no_grad()
@pytest.mark.parametrize("has_norms", [False, True])
def test_an_output_keeps_its_name(has_norms: bool, x: Tensor) -> None:
    module = Attention(has_norms=has_norms)
    module.to_out = nn.Identity()
    exported = capture(module, x, x)
    swap_attention(exported.graph_module)
    (output,) = exported.graph.find_nodes(op="output")
    assert [node.name for node in output.args[0]] == list(exported.graph_signature.user_outputs)
    assert relative(exported.module()(x, x), module(x, x)) < EXACT
