"""Nodes of a captured graph, read as what they do: the words that patterns are made of.

A graph is as torch.export leaves it: operators of aten, some of which write in place.

Axes: B batch, N heads, L tokens, D head width, C = N D.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

ATEN = torch.ops.aten
CHECK = ATEN._assert_tensor_metadata.default
# They keep the order of values in memory, so that the shape of the outcome says all.
RESHAPES = (ATEN.view.default, ATEN.reshape.default, ATEN.flatten.using_ints, ATEN.unflatten.int)
CONVERSIONS = (ATEN.to.dtype, ATEN.to.dtype_layout, ATEN.type_as.default, ATEN.contiguous.default)
# What may give its input itself, although its declaration does not say so.
_SILENT_VIEWS = (ATEN.type_as.default, ATEN.dropout.default, operator.getitem)
_CONSTANTS = (ATEN.ones_like.default, ATEN.zeros_like.default)
# Along one axis, whose name is "dim"; the others stay as they are.
_ALONG = (ATEN.slice.Tensor, ATEN.select.int, ATEN.unsqueeze.default, ATEN.index_select.default)


def arguments(node: Node) -> dict[str, Any]:
    """Give what an operator is called with by its names, defaults included."""
    assert isinstance(node.target, OpOverload)
    declared = node.target._schema.arguments
    given = {a.name: a.default_value for a in declared if a.has_default_value()}
    return given | dict(zip((a.name for a in declared), node.args, strict=False)) | node.kwargs


def call(graph: Graph, target: Any, args: tuple[Any, ...], *, like: Node, **options: Any) -> Node:
    """Add a node at the place that a graph inserts at, which belongs to the module of another."""
    node = graph.call_function(target, args, options)
    node.meta = {key: part for key, part in like.meta.items() if key != "tensor_meta"}
    values = torch.fx.map_arg(args, lambda arg: arg.meta["val"])
    with torch.no_grad():  # our operators have no gradient, and weights ask for one
        node.meta["val"] = target(*values, **options)
    return node


def shape_of(node: Node) -> tuple[Any, ...]:
    """Give the shape of a node's tensor, in which sizes that vary are symbols."""
    return tuple(node.meta["val"].shape)


def is_same(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    """Say whether shapes are the same for all sizes that vary."""
    pairs = zip(shape, other, strict=False)
    return len(shape) == len(other) and all(statically_known_true(a == b) for a, b in pairs)


def unconverted(node: Node) -> Node:
    """Give a node without the conversions behind it that change nothing."""
    while node.target in CONVERSIONS:
        source = arguments(node)["self"]
        if _kind(source) != _kind(node):
            break
        node = source
    return node


def _kind(node: Node) -> tuple[Any, ...]:
    tensor = node.meta["val"]
    return tensor.dtype, tensor.device, tensor.layout


def reshaped(node: Node) -> Node | None:
    """Give what a node only gives another shape to."""
    return arguments(node)["self"] if node.target in RESHAPES else None


def split(node: Node) -> Node | None:
    """Give the [B, L, C] whose heads a node splits: [B, L, N, D]."""
    packed = reshaped(node)
    if packed is None or len(shape_of(packed)) != 3 or len(shape_of(node)) != 4:
        return None
    return packed if is_same(shape_of(packed)[:2], shape_of(node)[:2]) else None


def exchanged(node: Node) -> Node | None:
    """Give what a node exchanges the tokens and heads of: axes 1 and 2 of four."""
    if node.target not in (ATEN.permute.default, ATEN.transpose.int) or len(shape_of(node)) != 4:
        return None
    given = arguments(node)
    order = [0, 1, 2, 3]
    if node.target is ATEN.permute.default:
        order = [axis % 4 for axis in given["dims"]]
    else:
        first, second = given["dim0"] % 4, given["dim1"] % 4
        order[first], order[second] = second, first
    return given["self"] if order == [0, 2, 1, 3] else None


def neighbour(node: Node) -> tuple[Node, int] | None:
    """Read [..., D / 2] as every other channel: give of what, and 0 if even ones, 1 if odd ones."""
    if node.target is not operator.getitem:
        return None
    unbound, number = node.args
    if not isinstance(unbound, Node) or unbound.target is not ATEN.unbind.int:
        return None
    given = arguments(unbound)
    pairs = given["self"]
    source = reshaped(pairs)
    if source is None or given["dim"] % len(shape_of(pairs)) != len(shape_of(source)):
        return None
    is_by_two = is_same(shape_of(pairs), (*shape_of(source)[:-1], shape_of(source)[-1] // 2, 2))
    return (source, number) if is_by_two and isinstance(number, int) else None


def interleaved(node: Node) -> tuple[Node, Node] | None:
    """Read [..., D] as two halves [..., D / 2] that take turns: give both."""
    stacked = reshaped(node)
    if stacked is None or stacked.target is not ATEN.stack.default:
        return None
    given = arguments(stacked)
    last = len(shape_of(node))
    if len(given["tensors"]) != 2 or given["dim"] % (last + 1) != last:
        return None
    even, odd = given["tensors"]
    is_joined = is_same(shape_of(node)[:-1], shape_of(stacked)[:-2])
    return (even, odd) if is_joined else None


def terms(node: Node, target: Any) -> tuple[Node, ...]:
    """Give the two tensors that a node adds, subtracts or multiplies; none if it is otherwise."""
    if node.target is not target:
        return ()
    given = arguments(node)
    parts = (given["self"], given["other"])
    is_plain = given.get("alpha", 1) == 1 and all(isinstance(part, Node) for part in parts)
    return parts if is_plain else ()


def is_alike(node: Node, other: Node) -> bool:
    """Say whether nodes are the same, or the same views of the same."""
    node, other = unconverted(node), unconverted(other)
    while node is not other:
        if node.target not in (*RESHAPES, *_ALONG) or node.target is not other.target:
            return False
        given, others = arguments(node), arguments(other)
        node, other = unconverted(given.pop("self")), unconverted(others.pop("self"))
        if given != others:
            return False
    return True


def is_paired(node: Node) -> bool:
    """Say whether entries 2i and 2i + 1 of the last axis are alike in a table, by how it is made.

    False also where that cannot be told.
    """
    if not isinstance(node.target, OpOverload) or is_changed(node):
        return False
    if node.target in _CONSTANTS:
        return True
    given, last = arguments(node), len(shape_of(node)) - 1
    if node.target is ATEN.repeat_interleave.self_int:
        is_last = given["dim"] is not None and given["dim"] % (last + 1) == last
        return is_last and given["repeats"] == 2
    if node.target is ATEN.cat.default:
        is_even = all(is_same([shape_of(part)[-1] % 2], [0]) for part in given["tensors"])
        return is_even and all(is_paired(part) for part in given["tensors"])
    if node.target not in (*RESHAPES, *CONVERSIONS, *_ALONG, ATEN.expand.default):
        return False
    source = given["self"]
    is_kept = is_same(shape_of(source)[-1:], shape_of(node)[-1:])
    if node.target in _ALONG:
        axes = len(shape_of(source)) + (node.target is ATEN.unsqueeze.default)
        is_kept = is_kept and given["dim"] % axes != axes - 1
    return is_kept and is_paired(source)


def is_changed(node: Node) -> bool:
    """Say whether anything writes into a tensor, be it by a view."""
    return any(writes(user) for view in views(node) for user in view.users)


def views(node: Node) -> Iterator[Node]:
    """List a node and all that may share its memory, made from it."""
    yield node
    for user in node.users:
        if _may_view(user):
            yield from views(user)


def _may_view(node: Node) -> bool:
    if not isinstance(node.target, OpOverload) or node.target in _SILENT_VIEWS:
        return node.target in _SILENT_VIEWS
    return any(result.alias_info is not None for result in node.target._schema.returns)


def writes(node: Node) -> bool:
    """Say whether a node may write into a tensor that it is given."""
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    return isinstance(node.target, HigherOrderOperator)
