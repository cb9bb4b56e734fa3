"""References: the eager role, run by PyTorch; for the file format, onnx's checker and reader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny.bundles import freeze

from fewshot_rt.errors import ConfigError, EngineError, ModelError
from fewshot_rt.export import engine as engine_module
from fewshot_rt.export import onnx_graph
from fewshot_rt.export.engine import (
    FASTEST,
    available_engines,
    engine_names,
    fastest_engine,
    get_engine,
    missing_package,
    require_engine,
)
from fewshot_rt.export.engines import onnx as onnx_engine
from fewshot_rt.export.parity import compare, require
from fewshot_rt.export.program import Program
from fewshot_rt.predictor import Runner

BATCH = 3


@pytest.fixture(scope="module")
def decoder(make_tiny_base: Callable[[], Any]) -> tuple[Program, Runner]:
    return freeze(make_tiny_base(), "decoder", size=(32, 32), frames=5)


@pytest.fixture(scope="module")
def decoder_file(decoder: tuple[Program, Runner], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "decoder.onnx"
    onnx_engine.build(decoder[0], path, precision="fp32")
    return path


def check_engine(engine: str, program: Program, eager: Runner, path: Path) -> None:
    tool = get_engine(engine)
    tool.build(program, path, precision="fp32")
    runner = tool.load(path, program.signature)
    for batch in range(1, BATCH + 1):
        given = program.signature.example(seed=batch, batch=batch)
        parities = compare(eager(given), runner(given))
        require(parities, role=program.role, tolerance="fp32")


@pytest.mark.parametrize("engine", ["eager", "onnx"])
def test_the_decoder_agrees_with_eager(
    engine: str, decoder: tuple[Program, Runner], tmp_path: Path
) -> None:
    check_engine(engine, *decoder, tmp_path / f"decoder{get_engine(engine).suffix}")


def test_the_denoiser_agrees_with_eager_and_its_file_is_named_well(
    tiny_base: Any, tmp_path: Path
) -> None:
    path = tmp_path / "denoiser.onnx"
    program, eager = freeze(tiny_base, "denoiser", size=(32, 32), frames=5)
    check_engine("onnx", program, eager, path)
    model = onnx.load(path)
    values = {v.name: v for v in (*model.graph.input, *model.graph.output)}
    for spec in (*program.signature.inputs, *program.signature.outputs):
        sizes = values[spec.name].type.tensor_type.shape.dim
        assert tuple(d.dim_param or d.dim_value for d in sizes) == spec.axes
    assert {p.key: p.value for p in model.metadata_props}["role"] == "denoiser"
    # The attention operator stays whole, so that an engine can fuse it.
    assert sum(node.op_type == "Attention" for node in model.graph.node) == 2


def test_a_file_holds_one_half_of_the_autoencoder(
    decoder: tuple[Program, Runner], decoder_file: Path
) -> None:
    tensors = onnx.load(decoder_file).graph.initializer
    held = sum(len(tensor.raw_data) for tensor in tensors)
    assert held < 1.2 * decoder[0].size_bytes
    assert not any("autoencoder.encoder" in tensor.name for tensor in tensors)
    assert str(Path(__file__).parent.parent).encode() not in decoder_file.read_bytes()


def test_large_weights_lie_beside_the_file(
    decoder: tuple[Program, Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, eager = decoder
    monkeypatch.setattr(onnx_graph, "LARGEST_INLINE_BYTES", 1000)
    path = tmp_path / "decoder.onnx"
    check_engine("onnx", program, eager, path)
    data = tmp_path / "decoder.onnx.data"
    assert data.stat().st_size >= 0.9 * program.size_bytes
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (path, data):
        file.rename(moved / file.name)
    onnx_engine.load(moved / path.name, program.signature)


def test_threads_do_not_change_an_answer(
    decoder: tuple[Program, Runner], decoder_file: Path
) -> None:
    signature = decoder[0].signature
    given = signature.example(seed=5, batch=BATCH)
    one, two = (onnx_engine.load(decoder_file, signature, threads=n)(given) for n in (1, 2))
    np.testing.assert_allclose(one["image"], two["image"], rtol=0, atol=1e-6)


def test_what_does_not_fit_the_signature_is_refused(
    decoder: tuple[Program, Runner], decoder_file: Path
) -> None:
    signature = decoder[0].signature
    runner = onnx_engine.load(decoder_file, signature)
    latents = signature.example()["latents"]
    with pytest.raises(ModelError, match=r"expected tensors \['latents'\], got \['image'\]"):
        runner({"image": latents})
    with pytest.raises(ModelError, match=r"latents: axes .* do not admit"):
        runner({"latents": latents[..., :-1]})
    with pytest.raises(ModelError, match=r"latents: axes .* do not admit"):
        runner({"latents": np.repeat(latents, BATCH, axis=0)})
    with pytest.raises(ModelError, match="latents: expected float32, got float64"):
        runner({"latents": latents.astype(np.float64)})


@pytest.mark.parametrize("engine", ["eager", "onnx"])
@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_damaged_or_absent_file_says_so(
    engine: str, content: bytes | None, decoder: tuple[Program, Runner], tmp_path: Path
) -> None:
    path = tmp_path / f"decoder{get_engine(engine).suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"decoder\.\w+ is damaged .*Export it again"):
        get_engine(engine).load(path, decoder[0].signature)


def test_a_device_that_is_not_there_is_never_replaced(
    decoder: tuple[Program, Runner], decoder_file: Path
) -> None:
    signature = decoder[0].signature
    with pytest.raises(EngineError, match="has no device 'tpu': choose one of: cpu, cuda"):
        onnx_engine.load(decoder_file, signature, device="tpu")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA, so asking for it is no error")
    with pytest.raises(EngineError, match=r"cannot run on 'cuda' here.*Install fewshot-rt\[cuda\]"):
        onnx_engine.load(decoder_file, signature, device="cuda")


def test_engines_are_found_by_name() -> None:
    assert set(engine_names()) >= {"eager", "onnx"}
    assert set(available_engines()) >= {"eager", "onnx"}
    for name in engine_names():
        engine = get_engine(name)
        assert engine.name == name
        assert "fp32" in engine.precisions
        assert engine.suffix.startswith(".")
    with pytest.raises(ConfigError, match=r"unknown engine 'onxx'\. Did you mean 'onnx'"):
        get_engine("onxx")


def test_an_engine_without_its_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = missing_package("no_such_package", install="fewshot-rt[none]")
    assert reason == "the package 'no_such_package' is not installed. Install fewshot-rt[none]."
    monkeypatch.setattr(onnx_engine, "missing", lambda: reason)
    with pytest.raises(EngineError, match=r"^engine 'onnx' cannot run here: the package") as caught:
        require_engine("onnx")
    assert str(caught.value).endswith(
        "Install fewshot-rt[none], or choose one of: aoti, eager, inductor, openvino."
    )
    assert "onnx" not in available_engines()


def test_the_fastest_engine_that_can_build_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    absent: set[str] = set()
    for name in engine_names():
        here = get_engine(name)
        monkeypatch.setattr(
            here, "missing", lambda name=name: "absent." if name in absent else None
        )
    monkeypatch.setattr(engine_module, "missing_compiler", lambda: None)
    first, second, *_ = FASTEST["cpu"]
    assert fastest_engine("cpu") == first
    absent.add(first)
    assert fastest_engine("cpu") == second
    monkeypatch.setattr(engine_module, "missing_compiler", lambda: "there is no compiler.")
    # ONNX Runtime has bf16 on GPUs alone, and AOTInductor needs a compiler.
    with pytest.raises(EngineError, match=r"no engine can build bf16 for 'cpu' here"):
        fastest_engine("cpu", "bf16")
    assert fastest_engine("cuda:1", "fp16") == "trt"
    absent.add("trt")
    assert fastest_engine("cuda:1", "fp16") == "onnx"
    monkeypatch.setattr(engine_module, "missing_compiler", lambda: None)
    assert fastest_engine("cpu", "bf16") == "aoti"
    absent |= set(engine_names())
    with pytest.raises(EngineError, match=r"no engine can build fp32 for 'cpu' here"):
        fastest_engine("cpu")
    for order in FASTEST.values():
        for name, precisions in order.items():
            assert set(precisions) <= set(get_engine(name).precisions)
