"""8 bits for TensorRT: where they are rounded, by which scales, and what comes out.

References: the greatest magnitudes that ONNX Runtime meets, eager PyTorch in fp32; and NVIDIA's
Model Optimizer, where it is installed.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from tiny.trt import VERSION, answer, freeze, run_onnx

from fewshot_rt.errors import EngineError
from fewshot_rt.export import trt_declare
from fewshot_rt.export.forms import FP8_MOST, INT8_MOST
from fewshot_rt.export.onnx_graph import write_onnx
from fewshot_rt.export.onnx_trt import read_model, write_model
from fewshot_rt.export.onnx_trt_checks import check_model
from fewshot_rt.export.onnx_trt_int8 import quantise, read_greatest
from fewshot_rt.export.program import Program
from fewshot_rt.export.trt_declare import Declared, declare
from fewshot_rt.roles import Role

MOST = {"int8": INT8_MOST, "fp8": FP8_MOST}
HALF = {"int8": "fp16", "fp8": "bf16"}
# What rounding once for all costs tiny random weights, whose tokens have outliers.
LIMITS = {"int8": 3e-2, "fp8": 6e-2}
LAYERS = 1
# Of a block: queries, keys, values and outputs of two attentions, and a feed-forward network.
PRODUCTS = 10


@pytest.fixture(scope="module")
def frozen(make_tiny_base: Callable[..., Any]) -> tuple[Program, Role]:
    base = make_tiny_base(layers=LAYERS)
    return freeze(base, "denoiser", frames=5, size=(32, 32), word="mask")


@pytest.fixture(scope="module")
def examples(frozen: tuple[Program, Role]) -> list[dict[str, np.ndarray]]:
    return [frozen[0].signature.example(seed=seed) for seed in (1, 2, 3)]


def greatest(path: Path, layers: Sequence[str], examples: Sequence[Any]) -> dict[str, float]:
    """Run a model and give the greatest magnitude of the tokens of layers, by their weight."""
    model = onnx.load(path)
    nodes = {n.input[1]: n.input[0] for n in model.graph.node if n.name in layers}
    watched = sorted(set(nodes.values()))
    known = {v.name for v in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in watched if n not in known)
    onnx.save(model, path.with_name("watched.onnx"))
    names = [v.name for v in model.graph.output]
    met: dict[str, float] = {}
    for example in examples:
        for name, value in zip(
            names, run_onnx(path.with_name("watched.onnx"), example), strict=True
        ):
            met[name] = max(met.get(name, 0.0), float(np.abs(value).max()))
    return {weight: met[tokens] for weight, tokens in nodes.items()}


def stand_in(
    model: Path, rounded: Path, *, layers: Sequence[str], examples: Any, device: str
) -> None:
    """Calibrate as Model Optimizer does, by the greatest magnitudes."""
    assert device == "cpu"
    found = greatest(model, layers, examples)
    graph = read_model(model)
    quantise(graph, found, form="int8", folder=model.parent)
    write_model(graph, rounded)


@pytest.fixture(scope="module", params=["int8", "fp8"])
def rounded(
    request: pytest.FixtureRequest,
    frozen: tuple[Program, Role],
    examples: list[Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Declared]:
    """A form, and the graph in it."""
    form, folder = request.param, tmp_path_factory.mktemp(request.param)

    def write_once(program: Program, path: Path) -> None:
        """Write the graph in fp32 for both forms at once: it takes seconds."""
        if program is not frozen[0]:
            write_onnx(program, path)
            return
        kept = path.parent.parent / "exact.onnx"
        if not kept.exists():
            write_onnx(program, kept)
        shutil.copy(kept, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt_declare, "calibrate", stand_in)
        patch.setattr(trt_declare, "write_onnx", write_once)
        declared = declare(frozen[0], folder, precision=form, examples=examples, version=VERSION)
    return form, declared


def test_the_blocks_linear_layers_are_rounded_and_nothing_else(
    rounded: tuple[str, Declared],
) -> None:
    form, declared = rounded
    model = read_model(declared.path)
    check_model(model, role="denoiser", precision=HALF[form])
    sources = {name: node for node in model.graph.node for name in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    quantised = [node for node in products if node.input[1] in sources]
    assert len(quantised) == LAYERS * PRODUCTS
    assert all(".blocks." in node.name for node in quantised)
    assert not any(".blocks." in n.name for n in products if n.input[1] not in sources)
    assert declared.attentions == 2 * LAYERS
    # What TensorRT rounds when it builds cannot be set later.
    assert declared.slots == {}


def test_the_scales_are_those_that_were_found(
    rounded: tuple[str, Declared], examples: list[Any]
) -> None:
    form, declared = rounded
    exact = declared.path.with_name("exact.onnx")
    layers = [n.name for n in onnx.load(exact).graph.node if ".blocks." in n.name]
    # As read, tokens are as great as what int8 can hold.
    found = read_greatest(declared.path)
    known = greatest(exact, layers, examples)
    assert {name: value / INT8_MOST * MOST[form] for name, value in found.items()} == pytest.approx(
        known, rel=2**-8
    )
    model = onnx.load(declared.path)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for weight in known:
        amax = np.abs(numpy_helper.to_array(held[weight]).astype(np.float32)).max(axis=0)
        scale = numpy_helper.to_array(held[f"{weight}.scale"]).astype(np.float32)
        np.testing.assert_allclose(scale, amax / MOST[form], rtol=2**-8)


def test_the_answer_is_near_that_in_fp32(
    rounded: tuple[str, Declared], frozen: tuple[Program, Role], examples: list[Any], tmp_path: Path
) -> None:
    """In fp32 around the rounding, since ONNX Runtime has no bf16 here."""
    form, declared = rounded
    exact = declared.path.with_name("exact.onnx")
    model = read_model(exact)
    known = read_greatest(declared.path.with_name("rounded.onnx"))
    quantise(model, known, form=form, folder=exact.parent)
    write_model(model, tmp_path / "rounded.onnx")
    program, module = frozen
    given, expected = answer(module, program, seed=1)
    (found,) = run_onnx(tmp_path / "rounded.onnx", given)
    error = np.linalg.norm(found - expected["prediction"]) / np.linalg.norm(expected["prediction"])
    assert 1e-4 < error < LIMITS[form]


def forget_tokens(model: ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and "rounded" in n.input[1])
    sources = {name: other for other in model.graph.node for name in other.output}
    node.input[0] = sources[sources[node.input[0]].input[0]].input[0]


def share_scale(model: ModelProto) -> None:
    """Give the weights of one layer one scale."""
    tensor = next(t for t in model.graph.initializer if t.name.endswith("weight.T.scale"))
    zero = next(t for t in model.graph.initializer if t.name == tensor.name[:-5] + "zero")
    for of in (tensor, zero):
        of.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(of)[0], of.name))


def turn_scales(model: ModelProto) -> None:
    """Let the scales of a layer be along its channels in, where it has as many as out."""
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.attribute)
    node.attribute[0].i = 0


def round_attention(model: ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    source = next(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    node.input[2] = source.output[0]


MISTAKES: Mapping[str, Callable[[ModelProto], None]] = {
    "has one factor quantised alone": forget_tokens,
    r"has scales \(\) and \(\)": share_scale,
    "has scales along another axis": turn_scales,
    r"\(Attention\) is quantised and no product": round_attention,
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_rounding_that_is_misplaced_is_refused(
    message: str, rounded: tuple[str, Declared]
) -> None:
    form, declared = rounded
    model = read_model(declared.path)
    MISTAKES[message](model)
    with pytest.raises(EngineError, match=message):
        check_model(model, role="denoiser", precision=HALF[form])


def test_scales_need_examples_and_model_optimizer(
    frozen: tuple[Program, Role], examples: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="finds the scales of int8 on the images"):
        declare(frozen[0], tmp_path, precision="int8", examples=(), version=VERSION)
    if trt_declare.calibrate.__module__ != "fewshot_rt.export.modelopt":
        pytest.fail("the stand-in was left behind")


def test_without_model_optimizer_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewshot_rt.export import modelopt

    said = "the package 'modelopt' is not installed. Install nvidia-modelopt."
    monkeypatch.setattr(modelopt, "missing_package", lambda *_, **__: said)
    with pytest.raises(EngineError, match="scales for 8 bits cannot be found: the package"):
        modelopt.calibrate(
            tmp_path / "a.onnx", tmp_path / "b.onnx", layers=[], examples=[], device="cpu"
        )


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_model_optimizer_finds_the_same_scales(
    form: str, frozen: tuple[Program, Role], examples: list[Any], tmp_path: Path
) -> None:
    pytest.importorskip("modelopt", reason="NVIDIA's Model Optimizer is not installed")
    declared = declare(frozen[0], tmp_path, precision=form, examples=examples, version=VERSION)
    check_model(read_model(declared.path), role="denoiser", precision=HALF[form])
    found = read_greatest(tmp_path / "rounded.onnx")
    assert len(found) == LAYERS * PRODUCTS
    layers = [n.name for n in onnx.load(tmp_path / "exact.onnx").graph.node if ".blocks." in n.name]
    assert found == pytest.approx(greatest(tmp_path / "exact.onnx", layers, examples), rel=1e-3)
