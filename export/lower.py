"""One pass over a lifted graph: matrix products in fewer bits than fp32.

As with autocast, only products change: what is summed up, normalised and exponentiated stays in
fp32, and the compiler fuses the conversions into its neighbours.

    fp32   as captured
    bf16   products and attention in bf16
    fp16   the same in fp16
    int8   the blocks' linear layers in int8, the other products in bf16
    fp8    the blocks' linear layers in e4m3, the other products in bf16

"bf16 around blocks" leaves the blocks' linear layers in fp32, for engines that put them in int8.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from fewshot_rt.errors import ConfigError, unknown

from .forms import LINEAR, derive
from .lifted import HALVES, Lifted, Weight
from .regions import block_of

ATEN = torch.ops.aten
PRODUCTS = (
    ATEN.linear.default,
    ATEN.conv2d.default,
    ATEN.conv3d.default,
    ATEN.matmul.default,
    ATEN.scaled_dot_product_attention.default,
)
# Tensor cores take fp8 in multiples of it.
FP8_MULTIPLE = 16


def lower(lifted: Lifted, precision: str) -> None:
    """Change the products of a graph to a precision, in place.

    Raises: ConfigError for an unknown precision.
    """
    if precision not in _PASSES:
        raise ConfigError(unknown("precision", precision, _PASSES))
    _PASSES[precision](lifted)
    lifted.module.graph.eliminate_dead_code()
    _forget_unused(lifted)
    lifted.module.recompile()


def _keep(lifted: Lifted) -> None:
    """Leave all as it was captured."""


def _halve(
    lifted: Lifted,
    half: torch.dtype = torch.bfloat16,
    spares: Callable[[Node], bool] = lambda _: False,
) -> None:
    for node in list(lifted.module.graph.nodes):
        if node.op == "call_function" and _is_product(node) and not spares(node):
            _in_half(lifted, node, half)


def _halve_around_blocks(lifted: Lifted) -> None:
    _halve(lifted, spares=lambda node: _is_linear(node, lifted))


def _is_linear(node: Node, lifted: Lifted) -> bool:
    """Say whether a node is a linear layer of a block."""
    if node.target is not ATEN.linear.default:
        return False
    weight = node.args[1]
    is_weight = isinstance(weight, Node) and weight.name in lifted.weights
    return is_weight and block_of(node) is not None


def _to_fp16(lifted: Lifted) -> None:
    _halve(lifted, torch.float16)


def _quantise(lifted: Lifted, form: str, fits: Callable[[Node], bool]) -> None:
    for node in list(lifted.module.graph.nodes):
        if _is_linear(node, lifted) and fits(node):
            _in_8_bits(lifted, node, form)


def _to_int8(lifted: Lifted) -> None:
    _quantise(lifted, "int8", lambda node: node.meta["val"].dim() > 2)
    _halve(lifted)


def _to_fp8(lifted: Lifted) -> None:
    def fits(node: Node) -> bool:
        rows, columns = node.args[1].meta["val"].shape  # type: ignore[union-attr]
        is_aligned = rows % FP8_MULTIPLE == columns % FP8_MULTIPLE == 0
        return bool(is_aligned and node.meta["val"].dim() > 2)

    _quantise(lifted, "fp8", fits)
    _halve(lifted)


_PASSES: dict[str, Callable[[Lifted], None]] = {
    "fp32": _keep,
    "bf16": _halve,
    "bf16 around blocks": _halve_around_blocks,
    "fp16": _to_fp16,
    "int8": _to_int8,
    "fp8": _to_fp8,
}
PRECISIONS = tuple(_PASSES)


def _forget_unused(lifted: Lifted) -> None:
    """Leave out weights that no node takes any more."""
    for node in lifted.module.graph.find_nodes(op="placeholder"):
        if node.name in lifted.weights and not node.users:
            del lifted.weights[node.name]
            lifted.module.graph.erase_node(node)
    used = {weight.name for weight in lifted.weights.values()}
    for name in set(lifted.sources) - used:
        del lifted.sources[name]


def _is_product(node: Node) -> bool:
    return node.target in PRODUCTS or _is_ours(node)


def _is_ours(node: Node) -> bool:
    return str(getattr(node.target, "_name", "")).startswith("fewshot_rt::")


def _is_fp32(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _in_half(lifted: Lifted, node: Node, half: torch.dtype) -> None:
    """Let a product take and give half the bits; what comes after gets fp32 as before."""
    graph = lifted.module.graph
    if not _is_fp32(node):
        return
    factors = node.all_input_nodes
    if _is_ours(node):  # norms and rotary embeddings keep theirs
        factors = [arg for arg in node.args[:3] if isinstance(arg, Node)]
    with graph.inserting_before(node):
        given = {arg: _as_half(lifted, arg, node, half) for arg in factors if _is_fp32(arg)}
    node.args = torch.fx.map_arg(node.args, lambda arg: given.get(arg, arg))
    node.kwargs = torch.fx.map_arg(node.kwargs, lambda arg: given.get(arg, arg))
    node.meta["val"] = node.meta["val"].to(half)
    with graph.inserting_after(node):
        back = _call(graph, ATEN.to.dtype, (node, torch.float32), node)
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)


def _as_half(lifted: Lifted, node: Node, product: Node, half: torch.dtype) -> Node:
    """Convert what a product takes: at each call, or once for all if it is a weight."""
    if node.name in lifted.weights:
        return _in_form(lifted, node, HALVES[half])
    return _call(lifted.module.graph, ATEN.to.dtype, (node, half), product)


def _in_8_bits(lifted: Lifted, node: Node, form: str) -> None:
    """Replace a linear layer: tokens are scaled and rounded, multiplied, and scaled back."""
    graph = lifted.module.graph
    tokens, weight, *rest = node.args
    bias = rest[0] if rest else None
    assert isinstance(tokens, Node)
    assert isinstance(weight, Node)
    small, scale = (_in_form(lifted, weight, f) for f in (form, f"{form} scale"))
    with graph.inserting_before(node):
        product = graph.call_function(LINEAR[form], (tokens, small, scale, bias))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _in_form(lifted: Lifted, node: Node, form: str) -> Node:
    """Give a placeholder for another form of the same weight, in front of the graph."""
    weight = Weight(lifted.weights[node.name].name, form)
    for place in lifted.module.graph.find_nodes(op="placeholder"):
        if lifted.weights.get(place.name) == weight:
            found: Node = place
            return found
    with lifted.module.graph.inserting_before(node):
        other = lifted.module.graph.placeholder(f"{node.name}_{form.replace(' ', '_')}")
    other.meta = {key: value for key, value in node.meta.items() if key != "tensor_meta"}
    other.meta["val"] = derive(node.meta["val"], form)
    lifted.weights[other.name] = weight
    return other


def _call(graph: Graph, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    node = graph.call_function(target, args)
    node.meta = {key: value for key, value in like.meta.items() if key != "tensor_meta"}
    node.meta["val"] = target(*(a.meta["val"] if isinstance(a, Node) else a for a in args))
    return node
