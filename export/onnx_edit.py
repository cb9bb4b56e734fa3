"""Changes to an ONNX graph: nodes put in, taken out and gone around, types found anew.

Axes: B batch, N heads, L tokens, D head width.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

EXCHANGE = [0, 2, 1, 3]  # from [B, L, N, D] to [B, N, L, D], and back


def infer(model: "ModelProto") -> None:
    """Find the type and sizes of tensors, in place; what is known of those that are left is kept.

    (onnx 1.23 finds none behind GroupNormalization, of which the exporter has written them.)
    Raises: onnx.shape_inference.InferenceError if types do not fit.
    """
    from onnx import shape_inference

    found = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    made = {name for node in model.graph.node for name in node.output}
    del model.graph.value_info[:]
    model.graph.value_info.extend(v for v in found.graph.value_info if v.name in made)


def types_of(model: "ModelProto") -> dict[str, tuple[int, tuple[int | str, ...]]]:
    """Give type and sizes of every tensor by name; a size that varies is text."""
    graph = model.graph
    found = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        sizes = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim
        )
        found[value.name] = kind.elem_type, sizes
    return found


class Edit:
    """Changes to the nodes of a graph, which `finish` writes back in an order that runs."""

    def __init__(self, model: "ModelProto") -> None:
        self._graph = model.graph
        self._nodes: list[NodeProto] = list(model.graph.node)
        self._producers = {name: node for node in self._nodes for name in node.output}
        self._outputs = {value.name for value in model.graph.output}
        self._scalars = {tensor.name for tensor in model.graph.initializer if not tensor.dims}

    def find(self, kind: str) -> Iterator["NodeProto"]:
        """List the nodes of an operator as they were before changes."""
        return iter([node for node in self._nodes if node.op_type == kind])

    def producer(self, name: str) -> "NodeProto | None":
        """Give the node that a tensor comes from; None for inputs and weights."""
        return self._producers.get(name)

    def readers(self, name: str) -> list["NodeProto"]:
        """List the nodes that take a tensor."""
        return [node for node in self._nodes if name in node.input]

    def constant(self, name: str, value: Any, kind: int) -> str:
        """Add a constant of an ONNX type; give its name."""
        from onnx import helper, numpy_helper

        array = np.asarray(value).astype(helper.tensor_dtype_to_np_dtype(kind))
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def insert(
        self, before: "NodeProto", kind: str, inputs: list[str], output: str, **said: Any
    ) -> str:
        """Add a node in front of another; give the name of its output."""
        from onnx import helper

        node = helper.make_node(kind, inputs, [output], name=output, **said)
        self._nodes.insert(self._place(before), node)
        self._producers[output] = node
        return output

    def remove(self, node: "NodeProto") -> None:
        """Take a node out."""
        del self._nodes[self._place(node)]

    def bypass(self, node: "NodeProto") -> None:
        """Let all that take a node's output take its input."""
        for reader in self.readers(node.output[0]):
            inputs = [node.input[0] if name == node.output[0] else name for name in reader.input]
            reader.input[:] = inputs
        self.remove(node)

    def split_above(self, name: str) -> "NodeProto | None":
        """Find the transposition that a tensor comes from, if it is read by nothing else."""
        node = self.producer(name)
        while node is not None and len(self.readers(node.output[0])) == 1:
            if _exchanges(node):
                return node
            node = self.producer(node.input[0]) if self._is_placeless(node) else None
        return None

    def merge_below(self, name: str) -> "NodeProto | None":
        """Find the transposition that a tensor goes to, and to nothing else, if there is one."""
        readers = self.readers(name)
        while len(readers) == 1 and name not in self._outputs:
            (node,) = readers
            if _exchanges(node):
                return node
            name = node.output[0]
            readers = self.readers(name) if self._is_placeless(node) else []
        return None

    def _is_placeless(self, node: "NodeProto") -> bool:
        """Say whether a node does the same to every value, wherever it is."""
        return node.op_type == "Cast" or (node.op_type == "Mul" and node.input[1] in self._scalars)

    def finish(self) -> None:
        """Write the nodes back, less those that nothing reads."""
        nodes, wanted = [], set(self._outputs)
        for node in reversed(self._nodes):
            if wanted.intersection(node.output):
                nodes.append(node)
                wanted.update(node.input)
        del self._graph.node[:]
        self._graph.node.extend(reversed(nodes))

    def _place(self, node: "NodeProto") -> int:
        return next(i for i, other in enumerate(self._nodes) if other is node)


def _exchanges(node: "NodeProto") -> bool:
    return node.op_type == "Transpose" and list(node.attribute[0].ints) == EXCHANGE
