"""Rounding to 8 bits in a graph for TensorRT, by QuantizeLinear and DequantizeLinear.

The linear layers of the denoiser's blocks alone are rounded, tokens with one scale, weights with
one for each channel; attention is not. Scales are greatest magnitudes, those of tokens as a
calibration met them, over the greatest value of the type. Weights stay in half precision in front
of their rounding, which TensorRT does when it builds: as NVIDIA's Model Optimizer writes it.
Axes: K channels in, C channels out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .forms import FP8_MOST, INT8_MOST
from .onnx_edit import Edit, infer, types_of
from .onnx_graph import in_int8
from .onnx_trt_checks import FLOAT8, INT8, scale_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

# Greatest value and ONNX's number of the type.
FORMS = {"int8": (INT8_MOST, INT8), "fp8": (FP8_MOST, FLOAT8)}
FP8_MULTIPLE = 16  # tensor cores take fp8 in multiples of it
LEAST_SCALE = 1e-6  # what fp16 can hold; weights of zeros stay zeros with any


def layers_to_round(model: "ModelProto", form: str) -> list[str]:
    """List the linear layers of blocks, by name, whose sizes the form takes."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    multiple = FP8_MULTIPLE if form == "fp8" else 1
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul"
        and in_int8(node.op_type, node.name)
        and node.input[1] in sizes
        and all(size % multiple == 0 for size in sizes[node.input[1]])
    ]


def read_greatest(path: Path) -> dict[str, float]:
    """Read from a graph that is rounded to int8 how great tokens were, by the product's weight."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path, load_external_data=False).graph
    sources = {name: node for node in graph.node for name in node.output}
    held = {tensor.name: tensor for tensor in graph.initializer}

    greatest = {}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        tokens, weights = (scale_of(name, sources) for name in node.input)
        if tokens and weights:
            weight = sources[sources[node.input[1]].input[0]].input[0]
            greatest[weight] = float(numpy_helper.to_array(held[tokens])) * INT8_MOST
    return greatest


def quantise(
    model: "ModelProto", greatest: Mapping[str, float], *, form: str, folder: Path
) -> None:
    """Round both factors of products to 8 bits, in place.

    greatest: magnitude of the tokens, by the name of the weight. form: of `FORMS`. folder: where
    large weights lie beside the graph.
    """
    types, edit = types_of(model), Edit(model)
    (most, kind), rounded = FORMS[form], {}
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in edit.find("MatMul"):
        tokens, weight = node.input
        if weight not in greatest:
            continue
        half = types[tokens][0]
        key = tokens, greatest[weight]
        if key not in rounded:
            value = max(greatest[weight] / most, LEAST_SCALE)
            scale = edit.constant(f"{node.name}.tokens.scale", value, half)
            zero = edit.constant(f"{node.name}.tokens.zero", 0, kind)
            rounded[key] = _round(edit, node, f"{node.name}.tokens", tokens, scale, zero)
        scales = np.maximum(_greatest_of(held[weight], folder) / most, LEAST_SCALE)
        scale = edit.constant(f"{weight}.scale", scales, half)
        zero = edit.constant(f"{weight}.zero", np.zeros(len(scales)), kind)
        node.input[1] = _round(edit, node, f"{weight}.rounded", weight, scale, zero, axis=1)
        node.input[0] = rounded[key]
    edit.finish()
    infer(model)


def _round(
    edit: Edit,
    before: "NodeProto",
    name: str,
    source: str,
    scale: str,
    zero: str,
    **said: int,
) -> str:
    """Round a tensor to 8 bits and bring it back; give the name of what that gives."""
    small = edit.insert(before, "QuantizeLinear", [source, scale, zero], f"{name}.small", **said)
    return edit.insert(before, "DequantizeLinear", [small, scale, zero], name, **said)


def _greatest_of(weight: "TensorProto", folder: Path) -> np.ndarray:
    """Give the greatest magnitude of each channel. Shapes: weight [K, C], result [C]."""
    from onnx import numpy_helper

    found = numpy_helper.to_array(weight, str(folder)).astype(np.float32)
    greatest: np.ndarray = np.abs(found).max(axis=0)
    return greatest
