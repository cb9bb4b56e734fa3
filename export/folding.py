"""One pass over a captured graph: what is made of weights alone is made once, and is a weight.

A tiny autoencoder takes parts and sums of its weights where it knows that frames are alike or
missing. Left in the graph, these would be made at every call, of weights that are kept whole.
"""

import operator

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.node import map_arg

from fewshot_rt.kernels.swap_nodes import is_changed, writes


@torch.no_grad()
def fold_weights(exported: ExportedProgram) -> int:
    """Put what a graph makes of its weights in their place; give how many weights it made.

    Only for graphs whose weights will not change. No value changes.
    """
    graph, specs = exported.graph, exported.graph_signature.input_specs
    kept = {**exported.state_dict, **exported.constants}
    placeholders = graph.find_nodes(op="placeholder")
    pairs = list(zip(placeholders, specs, strict=True))
    names = {node: spec.target for node, spec in pairs if spec.kind is not InputKind.USER_INPUT}
    values = {n: kept[name] for n, name in names.items() if name in kept and not is_changed(n)}
    made: list[Node] = []
    for node in graph.nodes:
        if _is_made_of(node, values):
            values[node] = node.target(*map_arg(node.args, values.__getitem__))
            names[node] = f"{names[node.all_input_nodes[0]]}_{node.name}"
            made.append(node)
    # What only serves others of them is not kept itself.
    wanted = [node for node in made if any(user not in values for user in node.users)]
    for node in wanted:
        with graph.inserting_before(placeholders[0]):
            weight = graph.placeholder(f"b_{node.name}")
        weight.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(weight)
        specs.append(_buffer(weight, str(names[node])))
        exported.state_dict[str(names[node])] = values[node].contiguous().clone()
    specs[:] = [*specs[len(pairs) :], *specs[: len(pairs)]]
    for node in reversed(made):
        graph.erase_node(node)
    exported.graph_module.recompile()
    return len(wanted)


def _is_made_of(node: Node, values: dict[Node, Tensor]) -> bool:
    """Say whether a node gives the same at every call, because all that it is given is the same."""
    sources = node.all_input_nodes
    is_given = bool(sources) and all(source in values for source in sources)
    is_plain = node.target is operator.getitem or isinstance(node.target, OpOverload)
    is_drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    is_fixed = not is_drawn and not writes(node) and not is_changed(node)
    return is_given and is_plain and is_fixed and not node.kwargs


def _buffer(weight: Node, name: str) -> InputSpec:
    place = TensorArgument(name=weight.name)
    return InputSpec(kind=InputKind.BUFFER, arg=place, target=name, persistent=True)
