"""A captured graph whose weights are inputs: what compilers are given, so that weights can change.

Weights stay outside of what is compiled. Each is known by its name in the model and by its form,
which says what was made of it for arithmetic in fewer bits.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from fewshot_rt.errors import EngineError

from .forms import PLAIN

if TYPE_CHECKING:
    from .program import Program


class Weight(NamedTuple):
    """A tensor of a model in one form; see `fewshot_rt.export.forms.FORMS`."""

    name: str
    form: str = PLAIN


ATEN = torch.ops.aten
CHECK = ATEN._assert_tensor_metadata.default
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
CONVERSIONS = (ATEN.to.dtype, ATEN.type_as.default)


@dataclass(frozen=True)
class Lifted:
    """A graph that takes its weights, then the tensors of its role.

    module: gives a tuple. weights: by the name of the placeholder that stands for each. sources:
    tensors by their names in the model, as they were captured.
    """

    module: GraphModule
    weights: dict[str, Weight] = field(default_factory=dict)
    sources: dict[str, Tensor] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Node, ...]:
        """List the placeholders that stand for tensors of the role."""
        nodes = self.module.graph.find_nodes(op="placeholder")
        return tuple(node for node in nodes if node.name not in self.weights)


def lift(program: "Program") -> Lifted:
    """Copy the graph of a program, its weights as inputs; the program stays as it is.

    Weights are those of the program, not copies. What a base writes down as a list is captured on
    the CPU; here it is where the program runs, as compiled code and CUDA graphs need it.

    Raises: EngineError if the graph writes into its weights.
    """
    exported = program.exported
    signature = exported.graph_signature
    graph = Graph()
    outputs = graph.graph_copy(exported.graph, {})
    graph.output(tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,))
    _tidy(graph)
    lifted = Lifted(GraphModule({}, graph))
    known = {**exported.state_dict, **exported.constants}
    nodes = graph.find_nodes(op="placeholder")
    for spec, node in zip(signature.input_specs, nodes, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            continue
        assert spec.target is not None  # every weight has a name
        if any(_writes(user) for user in node.users):
            raise EngineError(
                f"the {program.role} writes into its own weights and cannot be compiled."
            )
        form = HALVES.get(known[spec.target].dtype, PLAIN)
        lifted.weights[node.name] = Weight(spec.target, form)
        source = known[spec.target].detach().to(program.device).contiguous()
        lifted.sources[spec.target] = source
        node.meta["val"] = node.meta["val"].to(program.device)
    return lifted


def _tidy(graph: Graph) -> None:
    """Leave out what does nothing: checks of types, and conversions to the type that is there.

    Conversions would chain blocks: each hands on what the one before has not changed.
    """
    for node in list(graph.nodes):
        if node.target is CHECK:
            graph.erase_node(node)
        elif (
            node.target in CONVERSIONS and node.meta["val"].dtype == node.args[0].meta["val"].dtype
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
