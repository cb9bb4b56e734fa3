"""What must hold of a graph before TensorRT sees it, and what its parser and kernels document.

Everything here is read from the graph; TensorRT itself may still refuse it.
Source of the operators and their types: NVIDIA/onnx-tensorrt, docs/operators.md, TensorRT 10.15.
Source of what attention is fused: NVIDIA's "Multi-Head Attention Fusion" (best practices, 10.x):
FP16 or BF16, 16 <= D <= 256, D a multiple of 8; fp32 is not on the list.
Axes: B batch, N heads, L tokens, D head width, K channels in, C channels out.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fewshot_rt.errors import EngineError

from .onnx_edit import types_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    Types = dict[str, tuple[int, tuple[int | str, ...]]]

# ONNX's numbers of types.
FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, BFLOAT16, FLOAT8 = 1, 2, 3, 6, 7, 9, 10, 16, 17
HALVES = {"fp16": FLOAT16, "bf16": BFLOAT16}
_FLOATS = frozenset({FLOAT, FLOAT16, BFLOAT16})
_NUMBERS = _FLOATS | {INT32, INT64}
_ALL = _NUMBERS | {BOOL}
# The operators of TensorRT's list that our models have, by the types that it names of their first
# input. A model with another operator needs a word here, if the list has it.
_OF_FLOATS = """
    Attention Conv Cos Erf Exp Floor Gelu Gemm GroupNormalization LayerNormalization MatMul
    QuantizeLinear RMSNormalization Reciprocal Resize Round Sigmoid Sin Softmax Sqrt Tanh
"""
_OF_NUMBERS = """
    Abs Add Clip DepthToSpace Div GreaterOrEqual Max Min Mul Neg Pad Pow ReduceL2 ReduceMean
    ReduceSum Relu ScatterND Sub
"""
_OF_ALL = """
    Concat ConstantOfShape Expand Gather GatherND Reshape Shape Slice Split Squeeze Tile
    Transpose Unsqueeze Where
"""
OPERATORS = {
    **dict.fromkeys(_OF_FLOATS.split(), _FLOATS),
    **dict.fromkeys(_OF_NUMBERS.split(), _NUMBERS),
    **dict.fromkeys(_OF_ALL.split(), _ALL),
    "Cast": _ALL | {UINT8},
    "DequantizeLinear": frozenset({INT8, FLOAT8}),
}
PRODUCTS = ("MatMul", "Gemm", "Conv")
LEAST_WIDTH, MOST_WIDTH, WIDTH_MULTIPLE = 16, 256, 8


def check_model(model: "ModelProto", *, role: str, precision: str) -> None:
    """Require of a graph what TensorRT needs and what was asked for.

    Operators and types that its parser knows, a type and known sizes on every edge, products in
    the precision, attention whole and of a kind that is fused (but in fp32), and quantisation
    around both factors of a product or none.

    Raises: EngineError that lists what is wrong.
    """
    types = types_of(model)
    found = [*_edges(model, types), *_operators(model, types)]
    if not found:
        found += _products(model, types, precision)
        found += [*_attention(model, types), *_quantisation(model, types)]
    if found:
        raise EngineError(
            f"the {role} cannot be built for TensorRT: {'; '.join(found[:5])}"
            f"{f'; and {len(found) - 5} more' if len(found) > 5 else ''}. Choose another precision "
            "or engine."
        )


def _operators(model: "ModelProto", types: "Types") -> Iterator[str]:
    for node in model.graph.node:
        if node.domain or node.op_type not in OPERATORS:
            yield f"{node.name} is {node.op_type}, which is not on the list of operators"
        elif types.get(node.input[0], (0,))[0] not in OPERATORS[node.op_type]:
            yield f"{node.name} is {node.op_type} of type {types.get(node.input[0])}"


def _edges(model: "ModelProto", types: "Types") -> Iterator[str]:
    for node in model.graph.node:
        for name in node.output:
            kind, sizes = types.get(name, (0, ("?",)))
            if name and (not kind or not all(isinstance(size, int) or size for size in sizes)):
                yield f"type or sizes of {name} are not known"


def _products(model: "ModelProto", types: "Types", precision: str) -> Iterator[str]:
    expected = HALVES.get(precision, FLOAT)
    for node in model.graph.node:
        kinds = {types[name][0] for name in node.input if name}
        if node.op_type in (*PRODUCTS, "Attention") and kinds - {BOOL} != {expected}:
            yield f"{node.name} has types {sorted(kinds)}, not {expected} ({precision})"


def _attention(model: "ModelProto", types: "Types") -> Iterator[str]:
    for node in model.graph.node:
        if node.op_type == "Softmax":
            yield f"{node.name} may be an attention that is not whole"
        if node.op_type != "Attention":
            continue
        kind, sizes = types[node.input[0]]
        if {attribute.name: attribute.f for attribute in node.attribute} != {"scale": 1.0}:
            yield f"{node.name} has a scale or other attributes"
        if len(node.output) != 1 or len(node.input) > 4 or len(sizes) != 4:
            yield f"{node.name} has {len(node.input)} inputs, {len(node.output)} outputs"
        elif kind != FLOAT and not _is_fused(sizes[3]):
            yield (
                f"{node.name} has heads {sizes[3]} wide, and attention is fused from "
                f"{LEAST_WIDTH} to {MOST_WIDTH} in multiples of {WIDTH_MULTIPLE} alone"
            )


def _is_fused(width: int | str) -> bool:
    return isinstance(width, int) and (
        LEAST_WIDTH <= width <= MOST_WIDTH and width % WIDTH_MULTIPLE == 0
    )


def _quantisation(model: "ModelProto", types: "Types") -> Iterator[str]:
    """Check that products have scales for both factors: one of tokens, and one for each channel."""
    sources = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        given = [scale_of(name, sources) for name in node.input]
        if node.op_type not in PRODUCTS:
            if any(given) and node.op_type != "DequantizeLinear":
                yield f"{node.name} ({node.op_type}) is quantised and no product"
            continue
        if bool(given[0]) != bool(given[1]):
            yield f"{node.name} has one factor quantised alone"
        if given[0] and given[1]:
            channels = types[node.output[0]][1][-1]
            if types[given[0]][1] != () or types[given[1]][1] != (channels,):
                yield f"{node.name} has scales {types[given[0]][1]} and {types[given[1]][1]}"
            after = sources[node.input[1]]
            before = sources[after.input[0]]
            if before.input[0] not in weights:
                yield f"{node.name} multiplies by no weight"
            if {_axis_of(before), _axis_of(after)} != {1}:
                yield f"{node.name} has scales along another axis than that of its channels"


def _axis_of(node: "NodeProto") -> int:
    """Give the axis that scales are along; ONNX's default is 1."""
    return next((int(said.i) for said in node.attribute if said.name == "axis"), 1)


def scale_of(name: str, sources: "dict[str, NodeProto]") -> str | None:
    """Give the scale that a tensor was rounded with; None if it was not."""
    node = sources.get(name)
    return node.input[1] if node is not None and node.op_type == "DequantizeLinear" else None
