"""A program in fewer bits, its weights bound into the graph again: what files are written of."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.fx import Graph

from .forms import PLAIN, derive
from .lifted import Lifted, Weight, lift
from .lower import PRODUCTS, lower
from .program import Program, capture


def lowered(
    program: Program, precision: str, *, change: Callable[[Graph], object] | None = None
) -> Program:
    """Give a program whose products are in a precision; in fp32, unchanged, the program itself.

    change: what to do first to the graph, which is a copy of the program's.

    The conversions are in the graph, and weights are kept in the type that the products take, under
    their names in the model (`weight_bf16` beside `weight` if a weight is there in both).

    Raises: ConfigError for an unknown precision; EngineError if the graph writes into its weights.
    """
    if precision == "fp32" and change is None:
        return program
    lifted = lift(program)
    if change is not None:
        change(lifted.module.graph)
    lower(lifted, precision)
    bound = capture(_Bound(lifted), program.signature, role=program.role)
    _say_where(lifted.module.graph, bound.exported.graph)
    return bound


class _Bound(nn.Module):
    """A lifted graph with its weights, which takes the tensors of its role."""

    def __init__(self, lifted: Lifted) -> None:
        super().__init__()
        self._lifted = lifted
        self._names = _name(lifted)
        for weight, name in self._names.items():
            place = name.split(".")
            tensor = derive(lifted.sources[weight.name], weight.form)
            _folder(self, place[:-1]).register_buffer(place[-1], tensor)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Shapes: as the signature of the role says."""
        given = iter(tensors)
        nodes = self._lifted.module.graph.find_nodes(op="placeholder")
        taken = [
            self.get_buffer(self._names[self._lifted.weights[node.name]])
            if node.name in self._lifted.weights
            else next(given)
            for node in nodes
        ]
        results: tuple[Tensor, ...] = self._lifted.module(*taken)
        return results


def _name(lifted: Lifted) -> dict[Weight, str]:
    """Name each form of each weight; the only form of a weight has its plain name."""
    weights = list(dict.fromkeys(lifted.weights.values()))
    forms: dict[str, int] = {}
    for weight in weights:
        forms[weight.name] = forms.get(weight.name, 0) + 1
    return {
        weight: weight.name
        if weight.form == PLAIN or forms[weight.name] == 1
        else f"{weight.name}_{weight.form.replace(' ', '_')}"
        for weight in weights
    }


def _say_where(before: Graph, after: Graph) -> None:
    """Tell products which module they come from: tracing a graph again forgets it."""
    pairs = zip(
        *([n for n in g.nodes if n.target in PRODUCTS] for g in (before, after)), strict=True
    )
    for source, node in pairs:
        assert source.target is node.target  # both graphs are in one order
        node.meta["nn_module_stack"] = source.meta["nn_module_stack"]


def _folder(module: nn.Module, path: list[str]) -> nn.Module:
    """Find or make the module at a path of names."""
    for name in path:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    return module
