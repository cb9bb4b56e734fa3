"""What stands around attention in a graph: norms, rotary embeddings, the split of heads.

From queries, keys and values we walk back to their projections, over the few kinds of nodes that
Wan, CogVideoX and LTX-Video have there. A walk that meets anything else is given up.

Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width, C = N D.
"""

from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from .declaration import DTYPES
from .launches import MOST_CHANNELS
from .normed import ACROSS_HEADS, PER_HEAD
from .swap_nodes import (
    ATEN,
    CHECK,
    arguments,
    call,
    exchanged,
    interleaved,
    is_alike,
    is_paired,
    is_same,
    neighbour,
    shape_of,
    split,
    terms,
    unconverted,
    views,
    writes,
)

ADD, SUB, MUL = ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor
# How a tensor lies during the walk, and which axes of its rotary tables are single there.
HEADS_FIRST, TOKENS_FIRST, PACKED = "B N L D", "B L N D", "B L C"
_SINGLE: dict[str, tuple[int, ...]] = {HEADS_FIRST: (0, 1), TOKENS_FIRST: (0, 2), PACKED: ()}
_END = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm of queries or keys, see `normed_attention`."""

    kind: str
    weight: Node
    bias: Node | None
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A rotary embedding: the tables that the graph has, and where it is.

    is_halved: whether tables have one entry for each pair of channels, or two that are alike.
    write: the node that writes what was turned over what was not, if it is so.
    """

    cosine: Node
    sine: Node
    is_halved: bool
    layout: str
    skip: int = 0
    write: Node | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Queries or keys: their projection [B, L, C], and what is done to it before it attends."""

    projection: Node
    norm: Norm
    turn: Turn | None


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """All that `normed_attention` takes over from the nodes around an attention."""

    query: Prepared
    key: Prepared
    value: Node


def read_surroundings(attention: Node) -> Surroundings | None:
    """Read what queries, keys and values come from; None if not all of it is understood."""
    given = arguments(attention)
    query, key = (_walk(given[name], attention) for name in ("query", "key"))
    value = _unsplit(given["value"])
    if query is None or key is None or value is None:
        return None
    found = Surroundings(query=query, key=key, value=value)
    is_even = query.turn is None or shape_of(attention)[-1] % 2 == 0
    is_possible = is_even and _agree(found) and not _is_disturbed(found, attention)
    return found if is_possible else None


def give_tables(graph: Graph, query: Prepared, *, like: Node) -> tuple[Node | None, Node | None]:
    """Add nodes for tables as `normed_attention` takes them: [L, D / 2] or [B, L, C / 2]."""
    turn = query.turn
    if turn is None:
        return None, None
    cosine, sine = (_give_table(graph, t, query, like=like) for t in (turn.cosine, turn.sine))
    return cosine, sine


def _give_table(graph: Graph, table: Node, query: Prepared, *, like: Node) -> Node:
    turn = query.turn
    assert turn is not None
    if not turn.is_halved:
        last = len(shape_of(table)) - 1
        table = call(graph, ATEN.slice.Tensor, (table, last, 0, _END, 2), like=like)
    if turn.layout != PACKED:
        axes = list(_SINGLE[turn.layout])
        return call(graph, ATEN.squeeze.dims, (table, axes), like=like)
    batch = shape_of(query.projection)[0]
    if is_same([shape_of(table)[0]], [batch]):
        return table
    if not isinstance(batch, int):
        batch = call(graph, ATEN.sym_size.int, (query.projection, 0), like=like)
    return call(graph, ATEN.expand.default, (table, [batch, -1, -1]), like=like)


def _walk(node: Node, attention: Node) -> Prepared | None:
    """Walk back from queries or keys to their projection."""
    layout, norm, turn = HEADS_FIRST, None, None
    while norm is None or layout != PACKED:
        node = unconverted(node)
        if (found := _unfolded(node, layout)) is not None:
            node, layout = found
        elif norm is not None:
            return None
        elif turn is None and (turned := _read_turn(node, layout, attention)) is not None:
            node, turn = turned
        elif (normed := _read_norm(node, layout)) is not None:
            node, norm = normed
        else:
            return None
    return Prepared(projection=node, norm=norm, turn=turn)


def _unsplit(node: Node) -> Node | None:
    """Walk back from values to their projection."""
    layout = HEADS_FIRST
    while layout != PACKED:
        found = _unfolded(unconverted(node), layout)
        if found is None:
            return None
        node, layout = found
    return node


def _unfolded(node: Node, layout: str) -> tuple[Node, str] | None:
    """Go one step back in how tokens and heads lie."""
    if layout == HEADS_FIRST and (source := exchanged(node)) is not None:
        return source, TOKENS_FIRST
    if layout == TOKENS_FIRST and (source := split(node)) is not None:
        return source, PACKED
    return None


def _read_norm(node: Node, layout: str) -> tuple[Node, Norm] | None:
    if node.target is ATEN.rms_norm.default and layout == PACKED:
        kind = ACROSS_HEADS
    elif node.target is ATEN.layer_norm.default and layout != PACKED:
        kind = PER_HEAD
    else:
        return None
    given = arguments(node)
    source, weight, bias = given["input"], given["weight"], given.get("bias")
    has_all = weight is not None and (bias is not None or kind == ACROSS_HEADS)
    if not has_all or len(given["normalized_shape"]) != 1 or not (given["eps"] or 0) > 0:
        return None
    dtype = source.meta["val"].dtype
    kinds = [t.meta["val"].dtype for t in (weight, bias) if t is not None]
    if node.meta["val"].dtype != dtype or not {*kinds} <= {dtype, torch.float32}:
        return None
    return source, Norm(kind=kind, weight=weight, bias=bias, epsilon=given["eps"])


def _read_turn(node: Node, layout: str, attention: Node) -> tuple[Node, Turn] | None:
    """Give what is turned, and how."""
    found = _turned(node, layout)
    if found is None and layout == HEADS_FIRST:
        return _overwritten(node, attention)
    return found


def _turned(node: Node, layout: str) -> tuple[Node, Turn] | None:
    found = _by_halves(node) or _by_wholes(node)
    if found is None:
        return None
    source, cosine, sine, is_halved = found
    turn = Turn(cosine=cosine, sine=sine, is_halved=is_halved, layout=layout)
    is_kept = node.meta["val"].dtype == source.meta["val"].dtype
    is_kept = is_kept and is_same(shape_of(node), shape_of(source))
    is_kept = is_kept and all(_fits(table, source, turn) for table in (cosine, sine))
    return (source, turn) if is_kept else None


def _overwritten(node: Node, attention: Node) -> tuple[Node, Turn] | None:
    """Read a tensor whose last tokens are turned in place (CogVideoX)."""
    users = [user for view in views(node) for user in view.users if user.target is not CHECK]
    found = [user for user in users if writes(user)]
    if len(found) != 1 or found[0].target is not ATEN.copy_.default:
        return None
    write = found[0]
    place, outcome = arguments(write)["self"], arguments(write)["src"]
    turned = _turned(unconverted(outcome), HEADS_FIRST)
    # Only attention may see what is written: nothing else would once the write is gone.
    is_seen = any(write < user for user in users if user is not attention)
    if turned is None or is_seen or write.users or not write < attention:
        return None
    taken, turn = turned
    if taken.target is not ATEN.slice.Tensor or not is_alike(place, taken):
        return None
    given = arguments(taken)
    skip = given["start"] or 0
    is_along_tokens = given["self"] is node and given["dim"] % 4 == 2 and given["step"] == 1
    is_rest = isinstance(skip, int) and is_same([shape_of(taken)[2]], [shape_of(node)[2] - skip])
    return (node, replace(turn, skip=skip, write=write)) if is_along_tokens and is_rest else None


def _fits(table: Node, source: Node, turn: Turn) -> bool:
    """Say whether a table has the axes that it should, where a tensor is turned."""
    *sizes, width = shape_of(source)
    sizes = [1 if axis in _SINGLE[turn.layout] else size for axis, size in enumerate(sizes)]
    width = width // 2 if turn.is_halved else width
    firsts = (sizes[0], 1) if turn.layout == PACKED else sizes[:1]
    if table.meta["val"].dtype not in DTYPES:
        return False
    return any(is_same(shape_of(table), (first, *sizes[1:], width)) for first in firsts)


def _by_halves(node: Node) -> tuple[Node, Node, Node, bool] | None:
    """Read even cosine - odd sine and even sine + odd cosine, which take turns (Wan)."""
    halves = interleaved(node)
    if halves is None:
        return None
    sums = (*terms(halves[0], SUB), *terms(halves[1], ADD))
    products = [product for part in sums if (product := terms(part, MUL))]
    if len(products) != 4:
        return None
    (even, cosine), (odd, sine), *crossed = products
    if crossed != [(even, sine), (odd, cosine)]:
        return None
    first, second = neighbour(even), neighbour(odd)
    if first is None or second is None or (first[1], second[1]) != (0, 1):
        return None
    return (first[0], cosine, sine, True) if first[0] is second[0] else None


def _by_wholes(node: Node) -> tuple[Node, Node, Node, bool] | None:
    """Read x cosine + (-odd and even in turns) sine (CogVideoX, LTX)."""
    products = [product for part in terms(node, ADD) if (product := terms(part, MUL))]
    if len(products) != 2:
        return None
    (straight, cosine), (crossed, sine) = products
    source, halves = unconverted(straight), interleaved(unconverted(crossed))
    if halves is None or halves[0].target is not ATEN.neg.default:
        return None
    odd, even = neighbour(arguments(halves[0])["self"]), neighbour(halves[1])
    if odd is None or even is None or (odd[1], even[1]) != (1, 0):
        return None
    if any(unconverted(found[0]) is not source for found in (odd, even)):
        return None
    return (source, cosine, sine, False) if is_paired(cosine) and is_paired(sine) else None


def _agree(found: Surroundings) -> bool:
    """Say whether queries, keys and values go together in one `normed_attention`."""
    query, key = found.query, found.key
    shapes = [shape_of(part) for part in (query.projection, key.projection, found.value)]
    norms = [(part.norm.kind, part.norm.epsilon) for part in (query, key)]
    (batch, length, channels), keys, values = shapes
    if norms[0] != norms[1] or not is_same(keys, values) or channels > MOST_CHANNELS:
        return False
    if not is_same([batch, channels], [keys[0], keys[2]]):
        return False
    if query.turn is None or key.turn is None:
        return query.turn is key.turn
    return is_same([length], [keys[1]]) and _turn_alike(query.turn, key.turn)


def _turn_alike(turn: Turn, other: Turn) -> bool:
    kinds = [(t.is_halved, t.layout, t.skip) for t in (turn, other)]
    tables = ((turn.cosine, other.cosine), (turn.sine, other.sine))
    return kinds[0] == kinds[1] and all(is_alike(*pair) for pair in tables)


def _is_disturbed(found: Surroundings, attention: Node) -> bool:
    """Say whether anything is written after the projections, which are read at attention then."""
    parts = (found.query, found.key)
    own = [part.turn.write for part in parts if part.turn is not None]
    node = min(found.query.projection, found.key.projection, found.value)
    while node is not attention:
        if writes(node) and node not in own:
            return True
        node = node.next
    return False
