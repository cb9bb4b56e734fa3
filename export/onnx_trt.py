"""A program as the ONNX graph that TensorRT is given: sizes fixed, attention whole, weights named.

TensorRT's parser (NVIDIA/onnx-tensorrt, `onnxOpImporters.cpp` and `AttentionHelpers.cpp`, 10.14 on)
makes `Attention` an `IAttention`, which has no scale: it multiplies queries and keys by the root of
it, rounded to their type, and so errs by up to 0.3 % in bf16 at head width 128. Here queries are
multiplied in fp32, before they are rounded, and the scale that is left is 1. `IAttention` is not
decomposable by default, so attention that no fused kernel takes fails the build; the attribute
`TRT_decomposable` allows it, which only fp32 is given: no fused kernel is documented for it.
Axes: B batch, N heads, L tokens, D head width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .onnx_edit import EXCHANGE, Edit, infer, types_of
from .onnx_graph import OPSET, PRODUCTS, is_large
from .trt_plugin import NAMESPACE, PLUGINS
from .trt_refit import Slot

if TYPE_CHECKING:
    from onnx import ModelProto

# Before this version the parser does not know RMSNormalization (TensorRT's CHANGELOG.md).
NORMS_SINCE = (10, 15)
# By ONNX's numbers.
TYPES = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}


@dataclass(frozen=True)
class Site:
    """One attention of a graph: its node, and what decides how fast it is.

    query, key: their sizes, [B, N, L, D]. type: of torch.
    """

    node: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    type: torch.dtype
    is_masked: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Give what decides how fast it is."""
        return self.query, self.key, self.type

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Give the shapes of queries, keys and values before heads are split, [B, L, N, D]."""
        return tuple(
            tuple(of[axis] for axis in EXCHANGE) for of in (self.query, self.key, self.key)
        )


def read_model(path: Path) -> "ModelProto":
    """Read a graph; large weights stay in the file beside it."""
    import onnx

    return onnx.load(path, load_external_data=not is_large(path))


def write_model(model: "ModelProto", path: Path) -> None:
    """Write a graph; large weights stay in the file beside it."""
    import onnx

    onnx.save(model, path)


def find_slots(model: "ModelProto", weights: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Say where in a graph the weights of products are, by their names in the model.

    weights: their shapes. A weight that several products take, or none as such, is left out.
    """
    from onnx import helper

    held = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = [node.input[1] for node in model.graph.node if node.op_type in PRODUCTS]
    slots = {}
    for name, shape in weights.items():
        for place in (name, f"{name}_fp16", f"{name}_bf16", f"{name}.T"):
            is_transposed = place.endswith(".T")
            if place in held and taken.count(place) == 1:
                sizes = tuple(held[place].dims)
                assert sizes == (shape[::-1] if is_transposed else shape), place
                kind = helper.tensor_dtype_to_np_dtype(held[place].data_type).name
                slots[name] = Slot(place, kind, is_transposed)
    return slots


def scale_attention(model: "ModelProto") -> None:
    """Multiply the queries of every attention by its scale, in fp32 where they come from it."""
    from onnx import helper

    types, edit = types_of(model), Edit(model)
    for node in edit.find("Attention"):
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        width = types[node.input[0]][1][3]
        scale = given.get("scale") or int(width) ** -0.5
        before = edit.producer(node.input[0])
        cast = before if before is not None and before.op_type == "Cast" else None
        source = node.input[0] if cast is None else cast.input[0]
        factor = edit.constant(f"{node.name}.scale", scale, types[source][0])
        scaled = edit.insert(node, "Mul", [source, factor], f"{node.name}.scaled")
        if cast is not None:
            to = types[node.input[0]][0]
            scaled = edit.insert(node, "Cast", [scaled], f"{node.name}.query", to=to)
        node.input[0] = scaled
        del node.attribute[:]  # what is left are defaults, of which TensorRT refuses some
        node.attribute.append(helper.make_attribute("scale", 1.0))
    edit.finish()
    infer(model)


def spell_out_norms(model: "ModelProto") -> None:
    """Write RMSNormalization over the last axis in simpler operators, for parsers without it."""
    from onnx import helper

    types, edit = types_of(model), Edit(model)
    for node in edit.find("RMSNormalization"):
        source, weight = node.input
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        name, kind = node.output[0], types[source][0]
        least = edit.constant(f"{name}.epsilon", given["epsilon"], kind)
        axes = edit.constant(f"{name}.axes", [-1], 7)
        square = edit.insert(node, "Mul", [source, source], f"{name}.square")
        mean = edit.insert(node, "ReduceMean", [square, axes], f"{name}.mean", keepdims=1)
        sum_ = edit.insert(node, "Add", [mean, least], f"{name}.sum")
        root = edit.insert(node, "Sqrt", [sum_], f"{name}.root")
        normed = edit.insert(node, "Div", [source, root], f"{name}.normed")
        edit.insert(node, "Mul", [normed, weight], name)
        edit.remove(node)
    edit.finish()
    infer(model)


def find_sites(model: "ModelProto") -> tuple[Site, ...]:
    """List the attentions of a graph, in its order."""
    types = types_of(model)
    return tuple(
        Site(
            node=node.name,
            query=tuple(int(size) for size in types[node.input[0]][1]),
            key=tuple(int(size) for size in types[node.input[1]][1]),
            type=TYPES[types[node.input[0]][0]],
            is_masked=len(node.input) > 3,
        )
        for node in model.graph.node
        if node.op_type == "Attention"
    )


def allow_decomposition(model: "ModelProto") -> None:
    """Let TensorRT spell attention out where no fused kernel takes it. Other tools refuse this."""
    from onnx import helper

    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute("TRT_decomposable", 1))


def put_plugin(model: "ModelProto", suits: Callable[[Site], bool]) -> int:
    """Put our kernel in the place of attention where it suits, and count these places.

    Where heads are split off by a transposition in front and merged by one behind, both go: the
    kernel reads and writes tokens side by side as well. Other tools do not know the operator.
    """
    from onnx import helper

    chosen = {site.node for site in find_sites(model) if suits(site)}
    edit = Edit(model)
    names = {is_packed: name for name, is_packed in PLUGINS.items()}
    for node in edit.find("Attention"):
        if node.name not in chosen:
            continue
        splits = [edit.split_above(name) for name in node.input]
        merge = edit.merge_below(node.output[0])
        is_packed = merge is not None and all(split is not None for split in splits)
        for transposition in (*splits, merge) if is_packed else ():
            edit.bypass(transposition)
        node.op_type = names[is_packed]
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("plugin_namespace", NAMESPACE))
        node.attribute.append(helper.make_attribute("aot", 1))
    edit.finish()
    return len(chosen)


def write_one_attention(site: Site) -> "ModelProto":
    """Make a graph of one attention, heads split in front and merged behind, to measure it.

    Shapes: query, key, value, answer [B, L, N, D].
    """
    from onnx import helper

    kind = {of: number for number, of in TYPES.items()}[site.type]
    inputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, shape in zip(("query", "key", "value"), site.shapes, strict=True)
    ]
    answer = helper.make_tensor_value_info("answer", kind, site.shapes[0])
    heads = [f"{value.name}.heads" for value in inputs]
    splits = [
        helper.make_node("Transpose", [value.name], [split], name=split, perm=EXCHANGE)
        for value, split in zip(inputs, heads, strict=True)
    ]
    attention = helper.make_node("Attention", heads, ["attended"], name="attended", scale=1.0)
    merge = helper.make_node("Transpose", ["attended"], ["answer"], name="merge", perm=EXCHANGE)
    graph = helper.make_graph([*splits, attention, merge], "attention", inputs, [answer])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    infer(model)
    return model
