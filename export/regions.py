"""Cut a lifted graph into regions, so that a block that is repeated is compiled once.

A transformer is one block many times over. Where blocks follow each other and are the same but for
their weights, they share one region, which is called once for each; what stands before and after
them are regions of their own. A plan says in which order regions are called, and with what.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fewshot_rt.errors import EngineError

from .lifted import Lifted, Weight

# Share of the graph to compile above which cutting is not worth its seams.
MOST_COMPILED = 2 / 3
_BLOCK = re.compile(r"^(.*?)\.(\d+)(?:\.|$)")


class Value(NamedTuple):
    """A tensor that a region takes: of kind "weight", "input" (of the role) or "value" (computed).

    name: of a weight its name in the model; else a number as text. form: of a weight.
    """

    kind: str
    name: str
    form: str = ""


@dataclass(frozen=True)
class Call:
    """One call of a region: what it takes, and the numbers of the values that it gives."""

    region: str
    takes: tuple[Value, ...]
    gives: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The calls that make up a role, and the numbers of the values that are its outputs."""

    calls: tuple[Call, ...]
    outputs: tuple[Value, ...]

    def weights(self) -> tuple[Weight, ...]:
        """List the weights that the calls take, each once."""
        taken = {v: None for call in self.calls for v in call.takes if v.kind == "weight"}
        return tuple(Weight(value.name, value.form) for value in taken)

    def spent(self) -> tuple[tuple[int, ...], ...]:
        """List after each call the numbers of the values that nothing takes any more."""
        last = {n: i for i, call in enumerate(self.calls) for n in call.gives}
        for i, call in enumerate(self.calls):
            last |= {int(v.name): i for v in call.takes if v.kind == "value"}
        kept = {int(v.name) for v in self.outputs if v.kind == "value"}
        order = range(len(self.calls))
        return tuple(tuple(n for n, at in last.items() if at == i and n not in kept) for i in order)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return {
            "calls": [
                {"region": c.region, "takes": [list(v) for v in c.takes], "gives": list(c.gives)}
                for c in self.calls
            ],
            "outputs": [list(value) for value in self.outputs],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """Make a plan from what `to_dict` gave, or from its JSON."""
        calls = tuple(
            Call(c["region"], tuple(Value(*v) for v in c["takes"]), tuple(c["gives"]))
            for c in values["calls"]
        )
        return cls(calls, tuple(Value(*v) for v in values["outputs"]))


class Block(NamedTuple):
    """Which of the repeated blocks a node belongs to: the path of their list, and the number."""

    path: str
    number: int


def block_of(node: Node) -> Block | None:
    """Say which block of a list of blocks a node came from; None if from none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = [name for name, _ in stack.values()][-1]
    found = _BLOCK.match(path.removeprefix("L['self']."))
    return Block(found[1], int(found[2])) if found else None


def cut(lifted: Lifted, *, whole: bool = False) -> tuple[dict[str, GraphModule], Plan]:
    """Give the regions by name, and how they are called. whole: one region for all.

    Raises: EngineError if a size cannot be found again inside of a region.
    """
    nodes = [n for n in lifted.module.graph.nodes if n.op not in ("placeholder", "output")]
    segments = [nodes] if whole else _choose(nodes)
    regions: dict[str, GraphModule] = {}
    keys: dict[Any, str] = {}
    values = _known(lifted)
    calls = []
    for segment in segments:
        module, takes, gives = _outline(segment)
        key = _key(module, takes)
        if key not in keys:
            keys[key] = f"region{len(regions)}"
            regions[keys[key]] = module
        numbers = range(len(values), len(values) + len(gives))
        calls.append(Call(keys[key], tuple(values[n] for n in takes), tuple(numbers)))
        values |= {n: Value("value", str(i)) for n, i in zip(gives, numbers, strict=True)}
    (output,) = lifted.module.graph.find_nodes(op="output")
    return regions, Plan(tuple(calls), tuple(values[node] for node in output.args[0]))


def _choose(nodes: Sequence[Node]) -> list[list[Node]]:
    """Cut where that saves a third of what is compiled, or not at all."""
    segments = _merge(list(_segments(nodes)))
    unique = {_key_of(segment): len(segment) for segment in segments}
    return segments if sum(unique.values()) <= MOST_COMPILED * len(nodes) else [list(nodes)]


def _known(lifted: Lifted) -> dict[Node, Value]:
    """Give the placeholders as what they stand for."""
    values = {}
    for node in lifted.module.graph.find_nodes(op="placeholder"):
        weight = lifted.weights.get(node.name)
        if weight is not None:
            values[node] = Value("weight", weight.name, weight.form)
    values |= {node: Value("input", str(i)) for i, node in enumerate(lifted.inputs)}
    return values


def _segments(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Cut where another block begins; nodes without a place go with the one before."""
    segment: list[Node] = []
    current: Block | None = None
    for node in nodes:
        place = block_of(node) if node.meta.get("nn_module_stack") else current
        if place != current and segment:
            yield segment
            segment = []
        current = place
        segment.append(node)
    if segment:
        yield segment


def _merge(segments: Sequence[list[Node]]) -> list[list[Node]]:
    """Join neighbours that are not repeated."""
    keys = [_key_of(segment) for segment in segments]
    merged: list[list[Node]] = []
    was_single = False
    for segment, key in zip(segments, keys, strict=True):
        is_single = keys.count(key) == 1
        if is_single and was_single:
            merged[-1].extend(segment)
        else:
            merged.append(list(segment))
        was_single = is_single
    return merged


def _key_of(segment: Sequence[Node]) -> Any:
    """Give the key of a segment; one like no other if it cannot stand alone."""
    try:
        module, takes, _ = _outline(segment)
    except EngineError:
        return object()
    return _key(module, takes)


def _outline(segment: Sequence[Node]) -> tuple[GraphModule, list[Node], list[Node]]:
    """Copy nodes into a graph of their own; give it, what it takes and what it gives.

    A size that comes from outside is read off a tensor that is taken.
    """
    inside = set(segment)
    outside = {arg: None for node in segment for arg in node.all_input_nodes if arg not in inside}
    takes = [node for node in outside if _is_tensor(node)]
    sizes = [node for node in outside if not _is_tensor(node)]
    takes += [n for n in _measured(sizes, takes) if n not in inside]
    gives = [
        node
        for node in segment
        if _is_tensor(node) and any(user not in inside for user in node.users)
    ]
    graph = Graph()
    copies: dict[Node, Node] = {}
    for number, node in enumerate(takes):
        copies[node] = graph.placeholder(f"taken{number}")
        copies[node].meta = {"val": node.meta["val"]}
    for node in sizes:
        copies[node] = _size(graph, node, takes, copies)
    for node in segment:
        copies[node] = graph.node_copy(node, lambda arg: copies[arg])
    graph.output(tuple(_dense(graph, node, copies[node]) for node in gives))
    return GraphModule({}, graph), takes, gives


def _dense(graph: Graph, node: Node, copy: Node) -> Node:
    """Hand on what is dense: code is compiled for strides, and views would bring others."""
    if node.meta["val"].is_contiguous():
        return copy
    dense = graph.call_function(torch.ops.aten.contiguous.default, (copy,))
    dense.meta = {**copy.meta, "val": node.meta["val"].contiguous()}
    return dense


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


def _measured(sizes: Sequence[Node], takes: Sequence[Node]) -> list[Node]:
    """List the tensors that must be taken as well, since no other has such a size."""
    missing = [node for node in sizes if _place_of(node, takes) is None]
    return list(dict.fromkeys(n for node in missing for n in node.all_input_nodes if _is_tensor(n)))


def _size(graph: Graph, node: Node, takes: Sequence[Node], copies: dict[Node, Node]) -> Node:
    """Read a size off the first tensor that has an axis of it."""
    place = _place_of(node, takes)
    if place is None:
        raise EngineError(
            f"the graph cannot be cut at {node.name!r}, a size that no tensor has. Build it whole."
        )
    taken, axis = place
    found = graph.call_function(torch.ops.aten.sym_size.int, (copies[taken], axis))
    found.meta["val"] = taken.meta["val"].shape[axis]
    return found


def _place_of(node: Node, takes: Sequence[Node]) -> tuple[Node, int] | None:
    """Find the first tensor and its axis that has a size."""
    wanted = _plain(node.meta["val"])
    for taken in takes:
        for axis, size in enumerate(taken.meta["val"].shape):
            if isinstance(size, torch.SymInt) and _plain(size) == wanted:
                return taken, axis
    return None


def _plain(size: int | torch.SymInt) -> str:
    """Write a size so that those which are always equal look alike."""
    if isinstance(size, int):
        return str(size)
    return str(size.node.shape_env.replace(size.node.expr))


def _key(module: GraphModule, takes: Sequence[Node]) -> Any:
    """Give what two regions that are the same have in common."""
    places = {node: f"%{number}" for number, node in enumerate(module.graph.nodes)}

    def named(node: Node) -> tuple[Any, ...]:
        args, kwargs = (map_arg(part, lambda arg: places[arg]) for part in (node.args, node.kwargs))
        return node.op, str(node.target) if node.op != "placeholder" else "", str((args, kwargs))

    values = [node.meta["val"] for node in takes]
    shapes = tuple((str(v.dtype), *(_plain(size) for size in v.shape)) for v in values)
    return shapes, tuple(named(node) for node in module.graph.nodes)
