"""Two passes over a graph, about how rotary embeddings read and write pairs of channels.

diffusers' Wan writes the halves into an empty tensor, out[..., 0::2] = a and out[..., 1::2] = b. As
a graph of values each write is a scatter between two transposes of the whole tensor, which ONNX
Runtime runs slowly. stack((a, b), -1).flatten(-2) gives the same values.

OpenVINO is slow where pairs are read and interleaved value by value. But products of queries and
keys do not change when the channels of both change places alike: all even ones may come first.
"""

from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from fewshot_rt.kernels.swap import SDPA
from fewshot_rt.kernels.swap_nodes import (
    ATEN,
    arguments,
    call,
    exchanged,
    interleaved,
    neighbour,
    unconverted,
)


class _Write(NamedTuple):
    """`source` copied into `place`, which is every other value of an empty tensor."""

    place: Node
    copy: Node
    source: Node


def interleave_halves(exported: ExportedProgram) -> int:
    """Replace such pairs of writes in a graph; give how many there were. No value changes."""
    graph = exported.graph
    empties = [node for node in graph.nodes if node.target is ATEN.empty_like.default]
    found = [(empty, writes) for empty in empties if (writes := _half_writes(empty))]
    for empty, writes in found:
        _replace(graph, empty, writes)
    exported.graph_module.recompile()
    return len(found)


def part_halves(graph: Graph) -> int:
    """Let queries and keys attend with their even channels in front, where rotations give both.

    Gives how many attentions there were. Their outcome changes by the order of its sums alone.
    """
    count = 0
    for attention in [node for node in graph.nodes if node.target is SDPA]:
        given = arguments(attention)
        ends = [_interleaving(given[name], attention) for name in ("query", "key")]
        found = [end for end in ends if end is not None]
        if len({node for node, _ in found}) == len(ends):
            count += 1
            for node, halves in found:
                _rewrite(graph, node, ATEN.cat.default, (list(halves), -1))
    if count:
        for unbound in graph.find_nodes(op="call_function", target=ATEN.unbind.int):
            _read_parted(graph, unbound)
    graph.eliminate_dead_code()
    return count


def _interleaving(node: Node, user: Node) -> tuple[Node, tuple[Node, Node]] | None:
    """Walk back to where halves are interleaved, over what nobody else uses; give both, too."""
    while set(node.users) == {user}:
        halves = interleaved(node)
        if halves is not None:
            return node, halves
        source = exchanged(node) or unconverted(node)
        if source is node:
            return None
        node, user = source, node
    return None


def _read_parted(graph: Graph, unbound: Node) -> None:
    """Read pairs of channels as two halves, the first of each pair being put in front."""
    halves = [(user, found[1]) for user in unbound.users if (found := neighbour(user))]
    if not halves:
        return
    pairs = arguments(unbound)["self"]
    *others, last, two = range(pairs.meta["val"].dim())
    with graph.inserting_before(unbound):
        turned = call(graph, ATEN.permute.default, (pairs, [*others, two, last]), like=pairs)
        parted = call(graph, ATEN.flatten.using_ints, (turned, -2), like=pairs)
    width = pairs.meta["val"].shape[-2]
    for half, number in halves:
        place = (parted, last, number * width, (number + 1) * width)
        _rewrite(graph, half, ATEN.slice.Tensor, place)


def _rewrite(graph: Graph, node: Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        other = call(graph, target, args, like=node)
    node.replace_all_uses_with(other)
    graph.erase_node(node)


def _half_writes(empty: Node) -> tuple[_Write, ...]:
    """Give the two writes that fill an empty tensor, even places first; none if it is otherwise."""
    writes = {}
    for place in empty.users:
        write = _write(place) if place.target is ATEN.slice.Tensor else None
        if write is not None:
            writes[place.args[2]] = write
    if set(writes) != {0, 1}:
        return ()
    places = [write.place for write in writes.values()]
    last = max(write.copy for write in writes.values())
    is_read_early = any(user not in places and user < last for user in empty.users)
    return () if is_read_early else (writes[0], writes[1])


def _write(place: Node) -> _Write | None:
    """Read a slice as a write into every other value of the last axis, if that is all it is."""
    value, users = place.meta["val"], list(place.users)
    is_half = len(place.args) == 5 and place.args[1] in (value.dim() - 1, -1) and place.args[4] == 2
    if not is_half or len(users) != 1 or users[0].target is not ATEN.copy_.default:
        return None
    copy, source = users[0], users[0].args[1]
    if copy.users or copy.args[0] is not place or not isinstance(source, Node):
        return None
    # A write may also convert or repeat its source; stacking would not.
    given = source.meta["val"]
    fits = given.dtype == value.dtype and given.shape == value.shape
    return _Write(place, copy, source) if fits else None


def _replace(graph: Graph, empty: Node, writes: tuple[_Write, ...]) -> None:
    sources = [write.source for write in writes]
    with graph.inserting_after(max(write.copy for write in writes)):
        stacked = graph.call_function(ATEN.stack.default, (sources, -1))
    with graph.inserting_after(stacked):
        whole = graph.call_function(ATEN.flatten.using_ints, (stacked, -2))
    stacked.meta["val"] = torch.stack([source.meta["val"] for source in sources], -1)
    whole.meta["val"] = stacked.meta["val"].flatten(-2)
    places = [write.place for write in writes]
    empty.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in places)
    for node in (*(write.copy for write in writes), *places, empty):
        graph.erase_node(node)
