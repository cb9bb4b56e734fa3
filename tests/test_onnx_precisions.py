"""ONNX in fewer bits. References: the eager role in fp32, and onnx's own reading of a graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from tiny.bundles import frozen_roles
from torch import Tensor, nn

from fewshot_rt.errors import EngineError
from fewshot_rt.export import onnx_graph
from fewshot_rt.export.bound import lowered
from fewshot_rt.export.engines import onnx as onnx_engine
from fewshot_rt.export.engines.onnx import Bound
from fewshot_rt.export.onnx_graph import write_onnx
from fewshot_rt.export.parity import compare, require
from fewshot_rt.export.program import Program, capture
from fewshot_rt.predictor import Runner
from fewshot_rt.spec import Signature, TensorSpec

BATCH = 3


class Alone(nn.Module):
    """A convolution and a linear layer that are in no list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(4, 4, bias=False)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (self.linear(self.conv(tensors[0])),)


LAYERS = 1
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Of a block: queries, keys, values and outputs of two attentions; two of the feed-forward net.
LINEAR = 10


@pytest.fixture(scope="module")
def frozen(make_tiny_base: Callable[..., Any]) -> Callable[[str], tuple[Program, Runner]]:
    """A function that gives the program of a role, and the eager runner that is its reference."""
    return frozen_roles(make_tiny_base(LAYERS))


@pytest.fixture(scope="module")
def plain(frozen: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoiser as an ONNX file in fp32."""
    path: Path = tmp_path_factory.mktemp("plain") / "denoiser.onnx"
    onnx_engine.build(frozen("denoiser")[0], path, precision="fp32")
    return path


@pytest.fixture(scope="module")
def half(frozen: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoiser as an ONNX file in fp16."""
    path: Path = tmp_path_factory.mktemp("fp16") / "denoiser.onnx"
    write_onnx(lowered(frozen("denoiser")[0], "fp16"), path)
    return path


@pytest.fixture(scope="module")
def small(frozen: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoiser as an ONNX file in int8."""
    path: Path = tmp_path_factory.mktemp("int8") / "denoiser.onnx"
    program = frozen("denoiser")[0]
    onnx_engine.build(program, path, precision="int8", examples=examples(program))
    return path


def examples(program: Program) -> list[dict[str, np.ndarray]]:
    return [program.signature.example(seed=seed, batch=BATCH) for seed in range(4)]


@pytest.mark.parametrize(("role", "precision"), [("denoiser", "bf16"), ("decoder", "fp16")])
def test_products_are_in_half_the_bits_and_the_rest_is_not(
    precision: str, role: str, frozen: Any, tmp_path: Path
) -> None:
    program, eager = frozen(role)
    halved = lowered(program, precision)
    given = program.signature.example(seed=3, batch=BATCH)
    tensors = [torch.from_numpy(given[spec.name]) for spec in program.signature.inputs]
    found = halved.exported.module()(*tensors)
    (name,) = (spec.name for spec in program.signature.outputs)
    parity = compare(eager(given), {name: found[0].detach()})
    require(parity, role=role, tolerance=precision)
    assert parity[name].rel_l2 > 1e-6, "nothing was rounded"
    assert 0.45 * program.size_bytes < halved.size_bytes < 0.6 * program.size_bytes
    path = tmp_path / "half.onnx"
    write_onnx(halved, path)
    check_types(onnx.load(path), TYPES[precision], attentions=2 * LAYERS * (role == "denoiser"))


def check_types(model: Any, half: int, *, attentions: int) -> None:
    """Products and attention take and give half the bits; inputs and outputs are in fp32."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
    types |= {value.name: value.data_type for value in graph.initializer}
    nodes = [n for n in graph.node if n.op_type in ("MatMul", "Gemm", "Conv", "Attention")]
    assert sum(node.op_type == "Attention" for node in nodes) == attentions
    assert {types[name] for node in nodes for name in (*node.input, *node.output)} == {half}
    norms = [n for n in graph.node if n.op_type in ("LayerNormalization", "RMSNormalization")]
    assert {types[node.input[0]] for node in norms} <= {TensorProto.FLOAT}
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT


def test_fp16_as_onnx_runtime_sees_it(frozen: Any, half: Path) -> None:
    """Its kernels for processors lack fp16: it converts at every product, to the same numbers."""
    program, eager = frozen("denoiser")
    runner = onnx_engine.load(half, program.signature)
    for batch in range(1, BATCH + 1):
        given = program.signature.example(seed=batch, batch=batch)
        require(compare(eager(given), runner(given)), role="denoiser", tolerance="fp16")


def test_layers_have_the_names_of_their_modules(plain: Path, half: Path) -> None:
    for path in (plain, half):
        graph = onnx.load(path).graph
        weights = {value.name for value in graph.initializer}
        for block in range(LAYERS):
            for layer in ("attn1.to_q", "attn2.to_v", "attn1.to_out.0", "ffn.net.0.proj"):
                name = f"denoiser.transformer.blocks.{block}.{layer}"
                (node,) = (node for node in graph.node if node.name == name)
                assert node.op_type == "MatMul"
                assert node.input[1] == f"{name}.weight.T"
                assert node.input[1] in weights


def test_int8_is_in_the_layers_of_the_blocks_alone(frozen: Any, plain: Path, small: Path) -> None:
    graph = onnx.load(small).graph
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {value.name: value for value in graph.initializer}
    scaled = set()
    for node in graph.node:
        sources = [made_by.get(name) for name in node.input]
        is_scaled = [s is not None and s.op_type == "DequantizeLinear" for s in sources]
        if not any(is_scaled):
            continue
        assert node.op_type == "MatMul"
        assert all(is_scaled)
        scaled.add(node.name)
        weight, scale = (weights[name] for name in sources[1].input[:2])  # type: ignore[union-attr]
        assert weight.data_type == TensorProto.INT8
        assert list(scale.dims) == [weight.dims[1]]  # one for each output channel
    expected = {n.name for n in onnx.load(plain).graph.node if ".blocks." in n.name}
    assert len(expected) == LAYERS * LINEAR
    assert scaled == expected


def test_int8_is_near_and_does_not_depend_on_the_rest_of_a_batch(frozen: Any, small: Path) -> None:
    program, eager = frozen("denoiser")
    runner = onnx_engine.load(small, program.signature)
    for case in examples(program):
        parity = compare(eager(case), runner(case))
        require(parity, role="denoiser", tolerance="int8")
        assert parity["prediction"].rel_l2 > 1e-4, "nothing was rounded"
    one, other = examples(program)[:2]
    batched = [spec.name for spec in program.signature.inputs if spec.axes[0] == "batch"]
    mixed = one | {name: np.concatenate([one[name][:1], other[name][1:]]) for name in batched}
    alone, among = (runner(case)["prediction"][0] for case in (one, mixed))
    np.testing.assert_array_equal(alone, among)


def test_int8_of_a_large_model_keeps_its_data_beside_it(
    frozen: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_INLINE_BYTES", 1000)
    program, path = frozen("denoiser")[0], tmp_path / "denoiser.onnx"
    onnx_engine.build(program, path, precision="int8", examples=examples(program))
    assert {file.name for file in tmp_path.iterdir()} == {"denoiser.onnx", "denoiser.onnx.data"}
    given = examples(program)[0]
    found, expected = (onnx_engine.load(p, program.signature)(given) for p in (path, small))
    np.testing.assert_array_equal(found["prediction"], expected["prediction"])


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_int8_is_in_all_of_a_tiny_autoencoder_but_its_shortcut(
    role: str, frozen: Any, tmp_path: Path
) -> None:
    program, eager = frozen(role)
    path = tmp_path / "coder.onnx"
    onnx_engine.build(program, path, precision="int8", examples=examples(program))
    graph = onnx.load(path).graph
    made_by = {output: node for node in graph.node for output in node.output}
    kept = []
    for node in graph.node:
        if node.op_type == "Conv":
            sources = [made_by.get(name) for name in node.input[:2]]
            is_scaled = [s is not None and s.op_type == "DequantizeLinear" for s in sources]
            assert all(is_scaled) or not any(is_scaled)
            kept += [] if all(is_scaled) else [node.name]
    assert kept == [f"autoencoder.shortcut_{'in' if role == 'encoder' else 'out'}"]
    runner = onnx_engine.load(path, program.signature)
    for case in examples(program):
        (parity,) = (found := compare(eager(case), runner(case))).values()
        require(found, role=role, tolerance="int8")
        assert parity.rel_l2 > 1e-6, "nothing was rounded"


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("MatMul", "denoiser.transformer.blocks.3.attn1.to_q", True),
        ("MatMul", "denoiser.transformer.transformer_blocks.0.ff.net.0.proj/2", True),  # 2nd step
        ("MatMul", "denoiser.transformer.condition_embedder.time_embedder.linear_1", False),
        ("MatMul", "image_encoder.tower.vision_model.encoder.layers.0.self_attn.q_proj", False),
        ("MatMul", "autoencoder.decoder.up_blocks.0.time_embedder.linear_1", False),  # LTX 0.9.5
        ("Conv", "autoencoder.encoder.0", True),
        ("Convolution", "tiny_autoencoder.decoder.3.conv.0/2", True),
        ("Conv", "autoencoder.shortcut_out", False),
        ("Conv", "autoencoder.decoder.up_blocks.0.upsamplers.0.conv", False),  # CogVideoX
        ("Conv", "denoiser.transformer.patch_embedding", False),
        ("Gemm", "denoiser.transformer.blocks.3.attn1.to_q", False),
    ],
)
def test_layers_that_take_int8_are_known_by_name(kind: str, name: str, expected: bool) -> None:
    assert onnx_graph.in_int8(kind, name) is expected


def test_what_has_no_such_layers_stays_as_it_is(tmp_path: Path) -> None:
    size = ("batch", 3, 4, 4)
    signature = Signature(
        inputs=(TensorSpec("x", "float32", size),),
        outputs=(TensorSpec("y", "float32", size),),
        sizes={"batch": (1, 2, BATCH)},
    )
    module = Alone()
    path = tmp_path / "alone.onnx"
    program = capture(module, signature, role="alone")
    onnx_engine.build(program, path, precision="int8", examples=examples(program))
    for given in examples(program):
        expected = {"y": module(torch.from_numpy(given["x"]))[0].detach().numpy()}
        found = onnx_engine.load(path, signature)(given)
        require(compare(expected, found), role="alone", tolerance="fp32")


def test_what_cannot_be_built_is_refused(frozen: Any, tmp_path: Path) -> None:
    program, path = frozen("denoiser")[0], tmp_path / "denoiser.onnx"
    for precision in ("fp16", "bf16"):
        with pytest.raises(
            EngineError, match=rf"has {precision} on GPUs alone.*choose int8 or fp32"
        ):
            onnx_engine.build(program, path, precision=precision)
    with pytest.raises(EngineError, match="finds the scales of int8 on the images"):
        onnx_engine.build(program, path, precision="int8")
    assert not list(tmp_path.iterdir())


def test_bound_tensors_give_what_a_plain_session_gives(frozen: Any, plain: Path) -> None:
    """As on a GPU, but for the graph that is recorded there."""
    signature = frozen("denoiser")[0].signature
    session = onnxruntime.InferenceSession(str(plain), providers=["CPUExecutionProvider"])
    bound, runner = Bound(session, signature, device="cpu"), onnx_engine.load(plain, signature)
    kept = []
    for seed, batch in enumerate((2, 1, 2, 3, 1)):
        given = signature.example(seed=seed, batch=batch)
        (found,) = bound([given[spec.name] for spec in signature.inputs])
        kept.append((found, runner(given)["prediction"]))
    for found, expected in kept:  # after all calls, so that one that overwrites another is seen
        np.testing.assert_array_equal(found, expected)
