"""A program: one role of a model as one exported graph, whichever engine will run it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from fewshot_rt.spec import Signature

from .folding import fold_weights
from .rotary import interleave_halves


@dataclass(frozen=True)
class Program:
    """One exported graph of one role; its inputs and outputs are in the order of the signature."""

    role: str
    exported: ExportedProgram
    signature: Signature

    @property
    def size_bytes(self) -> int:
        """Give the size of the weights that the graph uses."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def device(self) -> str:
        """Say where the graph was captured, and so where it is built for."""
        return next((t.device.type for t in self._tensors()), "cpu")

    def _tensors(self) -> Iterator[torch.Tensor]:
        for tensors in (self.exported.state_dict, self.exported.constants):
            yield from (t for t in tensors.values() if isinstance(t, torch.Tensor))


@torch.no_grad()
def capture(module: nn.Module, signature: Signature, *, role: str) -> Program:
    """Trace a role once, for every size that its signature admits.

    Weights that the role does not use (an encoder's module may also hold the decoder) are left out.
    Except in a denoiser, whose weights adapters change, what is made of weights alone is a weight.
    The signature alone decides the example inputs and which axes vary.
    """
    # An example axis of size 0 or 1 would be taken for a constant by torch.export.
    sizes = {name: max(2, usual) for name, (_, usual, _) in signature.sizes.items()}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    example = signature.example(**{n: s for n, s in sizes.items() if _varies(signature, n)})
    tensors = tuple(torch.from_numpy(example[spec.name]).to(device) for spec in signature.inputs)
    # The roles take *tensors, so their shapes are one argument: a tuple.
    exported = torch.export.export(
        module, tensors, dynamic_shapes=(_dynamic_shapes(signature),), strict=False
    )
    if role != "denoiser":
        fold_weights(exported)
    _drop_unused(exported)
    interleave_halves(exported)
    # Stack traces would put the paths of this machine into every file.
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)
    return Program(role, exported, signature)


def _varies(signature: Signature, axis: str) -> bool:
    least, _, most = signature.sizes[axis]
    return least < most


def _dynamic_shapes(signature: Signature) -> tuple[dict[int, Any], ...]:
    dims = {
        name: Dim(name, min=least, max=most)
        for name, (least, _, most) in signature.sizes.items()
        if _varies(signature, name)
    }
    return tuple(
        {i: dims[axis] for i, axis in signature.varying(spec) if axis in dims}
        for spec in signature.inputs
    )


def _drop_unused(exported: ExportedProgram) -> None:
    """Take the weights that no node reads out of a graph, its signature and its tensors."""
    specs = exported.graph_signature.input_specs
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for spec, node in list(zip(specs, nodes, strict=True)):
        if node.users or spec.kind is InputKind.USER_INPUT:
            continue
        exported.graph.erase_node(node)
        specs.remove(spec)
        for tensors in (exported.state_dict, exported.constants):
            if spec.target is not None:
                tensors.pop(spec.target, None)
    exported.graph_module.recompile()
