"""The graphs that TensorRT is given: what is done to them, and what is checked.

References: eager PyTorch and ONNX Runtime, which compute the same; types as onnx infers them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper
from tiny.trt import BATCH, VERSION, answer, freeze, run_onnx

from fewshot_rt.errors import EngineError
from fewshot_rt.export.onnx_edit import EXCHANGE, infer, types_of
from fewshot_rt.export.onnx_trt import (
    Site,
    allow_decomposition,
    find_sites,
    put_plugin,
    read_model,
    scale_attention,
    spell_out_norms,
    write_one_attention,
)
from fewshot_rt.export.onnx_trt_checks import FLOAT16, check_model
from fewshot_rt.export.parity import compare, require
from fewshot_rt.export.program import Program
from fewshot_rt.export.trt_declare import declare
from fewshot_rt.export.trt_plugin import NAMESPACE, PLUGINS
from fewshot_rt.roles import Role
from fewshot_rt.spec import ROLES

TINY: dict[str, Any] = {"frames": 5, "size": (32, 32), "word": "mask"}


@pytest.fixture(scope="module")
def frozen(make_tiny_base: Callable[..., Any]) -> dict[str, tuple[Program, Role]]:
    base = make_tiny_base(layers=2)
    return {role: freeze(base, role, **TINY) for role in ROLES}


@pytest.fixture(scope="module")
def half(frozen: dict[str, tuple[Program, Role]], tmp_path_factory: Any) -> Path:
    """The graph of the denoiser in fp16."""
    folder = tmp_path_factory.mktemp("half")
    return write(frozen["denoiser"][0], folder, "fp16")


def write(program: Program, folder: Path, precision: str) -> Path:
    declared = declare(program, folder, precision=precision, examples=(), version=VERSION)
    return declared.path


def judge(path: Path, program: Program, module: Role, precision: str) -> None:
    given, expected = answer(module, program)
    names = [spec.name for spec in program.signature.outputs]
    found = dict(zip(names, run_onnx(path, given), strict=True))
    require(compare(expected, found), role=program.role, tolerance=precision)


@pytest.mark.parametrize("role", ROLES)
def test_a_graph_computes_what_eager_does(
    role: str, frozen: dict[str, tuple[Program, Role]], tmp_path: Path
) -> None:
    program, module = frozen[role]
    judge(write(program, tmp_path, "fp32"), program, module, "fp32")


def test_in_fewer_bits_products_alone_are_in_them(
    frozen: dict[str, tuple[Program, Role]], half: Path
) -> None:
    program, module = frozen["denoiser"]
    judge(half, program, module, "fp16")
    model = read_model(half)
    types = types_of(model)
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv", "Attention"):
            assert {types[name][0] for name in node.input} == {FLOAT16}
        elif node.op_type in ("LayerNormalization", "RMSNormalization"):
            assert types[node.input[0]][0] == onnx.TensorProto.FLOAT
    sizes = [size for _, shape in types.values() for size in shape]
    assert all(isinstance(size, int) for size in sizes)
    # Attention is whole, and nothing else is a softmax.
    assert [site.query for site in find_sites(model)] == [(BATCH, 1, 16, 64)] * 4


def one_attention(width: int, dtype: torch.dtype = torch.float32, **said: Any) -> ModelProto:
    shape = (BATCH, 3, 5, width)
    site = Site(node="attended", query=shape, key=shape, type=dtype, is_masked=False)
    model = write_one_attention(site)
    for node in model.graph.node:
        if node.op_type == "Attention":
            del node.attribute[:]
            node.attribute.extend(helper.make_attribute(name, of) for name, of in said.items())
    return model


def draw(model: ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    types = types_of(model)
    return {
        value.name: rng.normal(size=types[value.name][1]).astype(np.float32)
        for value in model.graph.input
    }


def run(model: ModelProto, folder: Path) -> np.ndarray:
    onnx.save(model, folder / "model.onnx")
    return run_onnx(folder / "model.onnx", draw(model))[0]


@pytest.mark.parametrize("said", [{}, {"scale": 0.3, "softcap": 0.0, "qk_matmul_output_mode": 0}])
def test_the_scale_goes_into_the_queries(said: dict[str, Any], tmp_path: Path) -> None:
    model = one_attention(64, **said)
    before = run(model, tmp_path)
    scale_attention(model)
    (node,) = [node for node in model.graph.node if node.op_type == "Attention"]
    assert [(of.name, of.f) for of in node.attribute] == [("scale", 1.0)]
    np.testing.assert_allclose(run(model, tmp_path), before, rtol=1e-4, atol=1e-6)


def test_the_scale_is_multiplied_before_queries_are_rounded(half: Path) -> None:
    model = read_model(half)
    types = types_of(model)
    sources = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Attention":
            cast = sources[node.input[0]]
            product = sources[cast.input[0]]
            assert [cast.op_type, product.op_type] == ["Cast", "Mul"]
            assert types[product.output[0]][0] == onnx.TensorProto.FLOAT


def test_tensorrts_parser_would_round_the_scale() -> None:
    """It multiplies queries and keys by the root of the scale, in their own type."""
    scale = torch.tensor(128.0, dtype=torch.float64) ** -0.5
    root = scale.sqrt().to(torch.bfloat16).double()
    assert abs(float(root * root / scale) - 1) > 2e-3


def test_norms_can_be_spelled_out(half: Path, tmp_path: Path) -> None:
    model = read_model(half)
    given = {v.name: v for v in model.graph.input}
    assert given
    kinds = [node.op_type for node in model.graph.node]
    spell_out_norms(model)
    assert "RMSNormalization" in kinds
    assert "RMSNormalization" not in [node.op_type for node in model.graph.node]
    check_model(model, role="denoiser", precision="fp16")
    onnx.save(model, tmp_path / "spelled.onnx")
    values = draw(model) | {"time": np.full(BATCH, 0.5, np.float32)}
    found, expected = run_onnx(tmp_path / "spelled.onnx", values), run_onnx(half, values)
    assert relative(found[0], expected[0]) < 1e-3


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def undo(model: ModelProto) -> None:
    """Write plugins as attention again, with the transpositions that the packed one took over."""
    nodes = []
    for node in model.graph.node:
        if node.op_type not in PLUGINS:
            nodes.append(node)
            continue
        assert {a.name: helper.get_attribute_value(a) for a in node.attribute} == {
            "plugin_namespace": NAMESPACE.encode(),
            "aot": 1,
        }
        taken, given = list(node.input), node.output[0]
        if PLUGINS[node.op_type]:
            heads = [f"{node.name}.{number}" for number in range(3)]
            pairs = zip(taken, heads, strict=True)
            nodes += [helper.make_node("Transpose", [a], [b], perm=EXCHANGE) for a, b in pairs]
            taken, given = heads, f"{node.name}.heads"
        nodes.append(helper.make_node("Attention", taken, [given], scale=1.0))
        if PLUGINS[node.op_type]:
            nodes.append(helper.make_node("Transpose", [given], node.output, perm=EXCHANGE))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]


def test_the_plugin_takes_over_attention_and_transpositions(half: Path, tmp_path: Path) -> None:
    model = read_model(half)
    transpositions = sum(node.op_type == "Transpose" for node in model.graph.node)
    # Self-attention of the first block alone.
    sites = find_sites(model)
    assert put_plugin(model, lambda site: site.node == sites[0].node) == 1
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("attention_by_tokens") == 1
    assert kinds.count("Attention") == 3
    assert kinds.count("Transpose") == transpositions - 4
    assert not {"attention_by_tokens", "attention_by_heads"} - set(PLUGINS)
    undo(model)
    onnx.save(model, tmp_path / "undone.onnx")
    values = draw(model) | {"time": np.full(BATCH, 0.5, np.float32)}
    np.testing.assert_allclose(
        run_onnx(tmp_path / "undone.onnx", values)[0], run_onnx(half, values)[0], rtol=0, atol=1e-5
    )


def test_where_heads_are_not_split_right_in_front_the_plugin_takes_them_split(
    tmp_path: Path,
) -> None:
    model = one_attention(64, scale=1.0)
    expected = run(model, tmp_path)
    # A table by tokens, as of a rotary embedding, comes after the split.
    table = helper.make_tensor("table", 1, (5, 64), np.full(320, 2.0, np.float32))
    model.graph.initializer.append(table)
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    turned = helper.make_node("Mul", [node.input[0], "table"], ["turned"], name="turned")
    node.input[0] = "turned"
    model.graph.node.insert(3, turned)
    infer(model)
    expected = run(model, tmp_path)
    assert put_plugin(model, lambda _: True) == 1
    assert "attention_by_heads" in [n.op_type for n in model.graph.node]
    undo(model)
    np.testing.assert_array_equal(run(model, tmp_path), expected)


def test_fp32_alone_may_be_decomposed(half: Path) -> None:
    model = read_model(half)
    names = {a.name for n in model.graph.node if n.op_type == "Attention" for a in n.attribute}
    assert "TRT_decomposable" not in names
    allow_decomposition(model)
    values = [a.i for n in model.graph.node for a in n.attribute if a.name == "TRT_decomposable"]
    assert values == [1] * 4


def break_operator(model: ModelProto) -> None:
    model.graph.node[0].op_type = "Einsum"


def break_type(model: ModelProto) -> None:
    """Leave a product in fp32."""
    node = next(n for n in model.graph.node if n.op_type == "MatMul")
    place = list(model.graph.node).index(node)
    casts = [
        helper.make_node("Cast", [name], [f"{name}.wide"], to=1, name=f"{name}.wide")
        for name in node.input
    ]
    back = helper.make_node("Cast", ["wide"], list(node.output), to=10, name="back")
    node.input[:] = [cast.output[0] for cast in casts]
    node.output[:] = ["wide"]
    model.graph.node.insert(place + 1, back)
    for cast in casts:
        model.graph.node.insert(place, cast)


def break_attention(model: ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    node.attribute.append(helper.make_attribute("is_causal", 1))


def add_softmax(model: ModelProto) -> None:
    node = model.graph.node[-1]
    name = node.output[0]
    node.output[0] = "raw"
    model.graph.node.append(helper.make_node("Softmax", ["raw"], [name], name="softmax"))


BREAKS = {
    "is Einsum, which is not on the list": break_operator,
    r"has types \[1\], not 10 \(fp16\)": break_type,
    "has a scale or other attributes": break_attention,
    "may be an attention that is not whole": add_softmax,
}


@pytest.mark.parametrize("message", BREAKS)
def test_what_tensorrt_does_not_take_is_refused(message: str, half: Path) -> None:
    model = read_model(half)
    BREAKS[message](model)
    if message != next(iter(BREAKS)):
        infer(model)
    with pytest.raises(
        EngineError, match=f"the denoiser cannot be built for TensorRT: .*{message}"
    ):
        check_model(model, role="denoiser", precision="fp16")


def test_heads_that_no_fused_kernel_takes_are_refused_but_in_fp32() -> None:
    narrow = one_attention(12, torch.float16, scale=1.0)
    with pytest.raises(EngineError, match="has heads 12 wide, and attention is fused from 16 to"):
        check_model(narrow, role="denoiser", precision="fp16")
    check_model(one_attention(12, scale=1.0), role="denoiser", precision="fp32")


def test_an_edge_without_a_type_is_refused(half: Path) -> None:
    model = read_model(half)
    del model.graph.value_info[:]
    with pytest.raises(EngineError, match=r"type or sizes of \S+ are not known"):
        check_model(model, role="denoiser", precision="fp16")
