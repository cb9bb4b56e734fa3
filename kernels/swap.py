"""One pass over a captured graph: torch's attention becomes our own operators.

In all families attention is one node, `aten.scaled_dot_product_attention`. Where the norms, rotary
embedding and split of heads in front of it are understood as well, `fewshot_rt::normed_attention`
takes the place of them all, else `fewshot_rt::attention` that of the node alone. What no kernel can
do is refused with the name of the node; a graph is changed whole or not at all.

Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .declaration import DTYPES
from .launches import MOST_WIDTH
from .swap_nodes import (
    ATEN,
    CHECK,
    arguments,
    call,
    exchanged,
    is_same,
    reshaped,
    shape_of,
    unconverted,
)
from .swap_patterns import Surroundings, give_tables, read_surroundings

SDPA = ATEN.scaled_dot_product_attention.default


@dataclass(frozen=True, kw_only=True)
class Site:
    """One attention of a graph: its node, and what decides how fast it is.

    heads N, length L, key_length K, width D: an axis that varies is None. is_masked: whether some
    keys do not count. is_normed: whether `normed_attention` takes over the norms, rotary embedding
    and split of heads in front, too.
    """

    node: str
    heads: int
    length: int | None
    key_length: int | None
    width: int
    dtype: torch.dtype
    is_masked: bool
    is_normed: bool


def find_attention(module: GraphModule, *, normed: bool = True) -> tuple[Site, ...]:
    """List the attentions of a graph, in its order, as `swap_attention` would replace them.

    Raises: ValueError with the name of the node that our kernel cannot take the place of.
    """
    return tuple(_read(node, normed) for node in _nodes(module.graph))


def swap_attention(
    module: GraphModule,
    *,
    suits: Callable[[Site], bool] = lambda _: True,
    normed: bool = True,
    precision: str = "ieee",
) -> tuple[Site, ...]:
    """Put our operators in the place of torch's attention where it suits; give those places.

    module: the `graph_module` of an ExportedProgram, or a graph that takes its weights as inputs,
    in the precision that it was captured in; each node has its tensor in meta["val"].
    suits: says of each attention whether to replace it, such as by what was measured.
    normed: whether to take over the norms, rotary embeddings and splits of heads, too, where they
    are understood; the answer says where. Attention with a shared norm then computes it for itself.
    precision: of the products in fp32, see `attention`; "ieee" if they will be in fewer bits.
    Raises: ValueError with the name of the node that our kernel cannot take the place of; the graph
    is as it was then.
    """
    sites = [(node, _read(node, normed)) for node in _nodes(module.graph)]
    chosen = [(node, site) for node, site in sites if suits(site)]
    for node, site in chosen:
        # Read again: an earlier attention may be what this one's projections were.
        around = read_surroundings(node) if site.is_normed else None
        if around is None:
            _replace(module.graph, node, precision)
        else:
            _replace_all(module.graph, node, around, precision)
    module.recompile()
    return tuple(site for _, site in chosen)


def _nodes(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.target is SDPA]


def _read(node: Node, normed: bool) -> Site:
    """Describe an attention. Raises: ValueError if the kernel has no such thing."""
    given = arguments(node)
    query, key = given["query"].meta["val"], given["key"].meta["val"]
    reason = _missing(given)
    if reason is not None:
        raise ValueError(
            f"attention {node.name!r} cannot be replaced: {reason}. Keep torch's attention in this "
            "graph."
        )
    return Site(
        node=node.name,
        heads=int(query.shape[1]),
        length=_fixed(query.shape[2]),
        key_length=_fixed(key.shape[2]),
        width=int(query.shape[3]),
        dtype=query.dtype,
        is_masked=given["attn_mask"] is not None,
        is_normed=normed and read_surroundings(node) is not None,
    )


def _missing(given: dict[str, Any]) -> str | None:
    """Say why the kernel cannot do what an attention is called with; None if it can."""
    query, key, value = (given[name].meta["val"] for name in ("query", "key", "value"))
    if given["dropout_p"] or given["is_causal"] or given["enable_gqa"]:
        return "it drops weights, looks one way only, or has fewer heads of keys"
    if any(tensor.dim() != 4 for tensor in (query, key, value)):
        return f"it has {query.dim()} axes, not [B, N, L, D]"
    if query.dtype not in DTYPES:
        return f"{query.dtype} is not among bf16, fp16 and fp32"
    if not is_same(value.shape[3:], key.shape[3:]) or query.shape[3] > MOST_WIDTH:
        return f"its heads are {query.shape[3]} and {value.shape[3]} wide"
    if not is_same(query.shape[:2], key.shape[:2]) or not is_same(key.shape, value.shape):
        return "its queries, keys and values are not of one batch and number of heads"
    if given["scale"] is not None and not given["scale"] > 0:
        return f"its scale is {given['scale']}"
    if given["attn_mask"] is not None:
        mask = given["attn_mask"].meta["val"]
        if not _is_of_keys(mask, key):
            return f"its mask, {mask.dtype} {list(mask.shape)}, is not bool [B, 1, 1, K]"
    return None


def _is_of_keys(mask: Any, key: Any) -> bool:
    """Say whether a mask is the same for all heads and queries."""
    shapes = [(batch, 1, 1, key.shape[2]) for batch in (1, key.shape[0])]
    return mask.dtype is torch.bool and any(is_same(mask.shape, shape) for shape in shapes)


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _replace(graph: Graph, node: Node, precision: str) -> None:
    """Put `attention` in the place of a node."""
    given = arguments(node)
    tensors = (given["query"], given["key"], given["value"])
    with graph.inserting_before(node):
        rest = (
            _give_mask(graph, given["attn_mask"], given["key"], like=node),
            given["scale"],
            precision,
        )
        operator = torch.ops.fewshot_rt.attention.default
        ours = call(graph, operator, (*tensors, *rest), like=node)
    _stand_in(ours, node)
    graph.erase_node(node)


def _replace_all(graph: Graph, node: Node, around: Surroundings, precision: str) -> None:
    """Put `normed_attention` in the place of a node and of what was read around it."""
    given, heads = arguments(node), shape_of(node)[1]
    query, key = around.query, around.key
    with graph.inserting_before(node):
        mask = _give_mask(graph, given["attn_mask"], key.projection, like=node)
        ours = call(
            graph,
            torch.ops.fewshot_rt.normed_attention.default,
            (
                *(query.projection, key.projection, around.value),
                *(query.norm.weight, query.norm.bias, key.norm.weight, key.norm.bias),
                *(*give_tables(graph, query, like=node), mask, heads),
            ),
            like=node,
            kind=query.norm.kind,
            epsilon=query.norm.epsilon,
            skip=0 if query.turn is None else query.turn.skip,
            scale=given["scale"],
            precision=precision,
        )
        apart = call(graph, ATEN.unflatten.int, (ours, 2, [heads, -1]), like=node)
        split = call(graph, ATEN.transpose.int, (apart, 1, 2), like=node)
    _stand_in(split, node)
    turns = [part.turn for part in (query, key) if part.turn is not None]
    written = dict.fromkeys(turn.write for turn in turns if turn.write is not None)
    for spent in (node, *written):
        inputs = spent.all_input_nodes
        graph.erase_node(spent)
        _erase_dead(graph, inputs)
    _merge(graph, split, ours)


def _merge(graph: Graph, split: Node, packed: Node) -> None:
    """Let what merges heads again read what they were split from, and erase what is left over."""
    merges = [m for user in split.users if exchanged(user) is not None for m in user.users]
    spent = [
        m for m in merges if reshaped(m) is not None and is_same(shape_of(m), shape_of(packed))
    ]
    for node in spent:
        # Conversions, too: one to the type of the old queries would keep them.
        spent += [user for user in node.users if unconverted(user) is unconverted(node)]
        _stand_in(packed, node)
    _erase_dead(graph, [*spent, split])


def _stand_in(ours: Node, node: Node) -> None:
    """Let all read our node instead of another, under its name where that is one of an output."""
    is_output = any(user.op == "output" for user in node.users)
    node.replace_all_uses_with(ours)
    if is_output:
        ours.name = node.name


def _erase_dead(graph: Graph, nodes: Iterable[Node]) -> None:
    """Erase nodes that nothing reads, and what only they read. Checks of types do not count."""
    pending, erased = list(nodes), set()
    while pending:
        node = pending.pop()
        is_read = any(user.target is not CHECK for user in node.users)
        if node in erased or node.op != "call_function" or is_read or node.is_impure():
            continue
        for check in list(node.users):
            graph.erase_node(check)
        pending += node.all_input_nodes
        graph.erase_node(node)
        erased.add(node)


def _give_mask(graph: Graph, mask: Node | None, key: Node, *, like: Node) -> Node | None:
    """Give the mask [B, K] of one that is [B or 1, 1, 1, K], B being that of the keys."""
    if mask is None:
        return None
    taken = call(graph, ATEN.squeeze.dims, (mask, [1, 2]), like=like)
    if is_same(shape_of(taken)[:1], shape_of(key)[:1]):
        return taken
    batch = shape_of(key)[0]
    if not isinstance(batch, int):
        batch = call(graph, ATEN.sym_size.int, (key, 0), like=like)
    return call(graph, ATEN.expand.default, (taken, [batch, -1]), like=like)
