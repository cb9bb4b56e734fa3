"""Engine `trt` around TensorRT: what it asks of a machine, and what it writes and finds in bundles.

References: ONNX Runtime on the same graph, in TensorRT's place; eager PyTorch. TensorRT itself runs
in no test here.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import bundles
from tiny.bundles import draw_adapter, eager_predictor, pictures
from tiny.trt import freeze, stand_in

from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.export import trt_network, trt_runtime
from fewshot_rt.export.build import add_adapter, export_bundle
from fewshot_rt.export.bundle import open_bundle, read_manifest
from fewshot_rt.export.engine import engine_names, get_engine, missing_package
from fewshot_rt.export.engines import trt
from fewshot_rt.export.parity import TOLERANCES, compare, require
from fewshot_rt.export.trt_runtime import facts_here, open_engine, require_facts
from fewshot_rt.spec import Signature, TensorSpec

RECIPE = replace(bundles.RECIPE, batch=2)
FACTS = {"TensorRT": "11.4.0.106", "compute capability": "9.0", "GPU": "NVIDIA H100 80GB HBM3"}
LAYERS = 1


def test_it_is_an_engine() -> None:
    assert "trt" in engine_names()
    engine = get_engine("trt")
    assert engine.name == "trt"
    assert set(engine.coders.values()) | set(engine.calibrated) <= set(engine.precisions)
    assert set(engine.precisions) <= set(TOLERANCES)


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "missing_package", missing_package)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("fewshot_rt.export.engine.find_spec", lambda _: None)
    assert "package 'tensorrt' is not installed. Install fewshot-rt[trt]." in str(trt.missing())


@pytest.mark.parametrize(
    ("found", "is_enough"), [("10.13.3.9", False), ("10.14.1.48", True), ("11.4.0.106", True)]
)
def test_it_says_what_is_too_old(
    found: str, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "missing_package", lambda *_, **__: None)
    monkeypatch.setattr(trt, "version", lambda _: found)
    reason = trt.missing()
    assert (reason is None) is is_enough
    if reason:
        assert reason == "TensorRT 10.13 is too old, it takes 10.14. Install fewshot-rt[trt]."


def test_it_is_for_gpus_alone(tmp_path: Path) -> None:
    signature = Signature(inputs=(), outputs=())
    with pytest.raises(EngineError, match=r"'trt' is for GPUs, not for 'cpu'\. Add --device cuda"):
        trt.load(tmp_path / "a.engine", signature)
    with pytest.raises(EngineError, match="cannot keep to 2 threads"):
        trt.load(tmp_path / "a.engine", signature, device="cuda", threads=2)
    program: Any = SimpleNamespace(device="cpu")
    with pytest.raises(EngineError, match="is for GPUs"):
        trt.build(program, tmp_path / "a.engine", precision="bf16")


@pytest.mark.parametrize("name", FACTS)
def test_an_engine_for_something_else_is_not_opened(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_runtime, "facts_here", lambda _: FACTS | {name: "other"})
    message = f"this engine was built for {name} {FACTS[name]}, and here it is other. Export it"
    with pytest.raises(EngineError, match=message):
        require_facts(FACTS, device="cuda")
    require_facts(FACTS | {name: "other"}, device="cuda")


def test_what_an_engine_depends_on_is_read_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_runtime, "version_here", lambda: (11, 4, 0, 106))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: FACTS["GPU"])
    assert facts_here("cuda") == FACTS


@pytest.mark.parametrize("text", ["", "[]", '{"facts": {}}'])
def test_damaged_facts_are_told(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a\.json is damaged .* Export it again"):
        trt.read_facts(tmp_path / "a.engine")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ModelError, match=r"a\.json is damaged .* Export it again"):
        trt.read_facts(tmp_path / "a.engine")


def test_a_missing_engine_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a\.engine is damaged .* Export it again"):
        open_engine(tmp_path / "a.engine", device="cuda")


class Profile:
    """Notes the sizes that it is told."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, name: str, *shapes: Any) -> None:
        self.shapes[name] = shapes


@pytest.mark.parametrize(("bounds", "count"), [((2, 2, 2), 0), ((1, 2, 4), 1)])
def test_a_profile_is_made_where_sizes_vary(
    bounds: tuple[int, int, int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(Dims=list))
    specs = TensorSpec("latents", "float32", ("batch", 8)), TensorSpec("prompt", "float32", (1, 5))
    signature = Signature(inputs=specs, outputs=(), sizes={"batch": bounds})
    profiles: list[Profile] = []
    builder: Any = SimpleNamespace(create_optimization_profile=Profile)
    config: Any = SimpleNamespace(add_optimization_profile=profiles.append)
    trt_network.add_profile(builder, config, signature)
    assert [of.shapes for of in profiles] == [{"latents": ([1, 8], [2, 8], [4, 8])}] * count


@pytest.fixture
def told() -> Iterator[list[dict[str, Any]]]:
    """What the builder is told, ONNX Runtime in its place."""
    with stand_in(FACTS) as found:
        yield found


def export(make: Callable[..., Any], folder: Path, precision: str) -> None:
    base, other = (make(layers=LAYERS) for _ in range(2))
    shared: Any = {"recipe": RECIPE, "prompt": base.embed("mask"), "folder": folder, "origin": {}}
    adapter = "one", draw_adapter(other, 1)
    list(export_bundle(base, adapter=adapter, engine="trt", precision=precision, **shared))


@pytest.mark.slow
def test_bundles_hold_engines_and_adapters_change_them(
    told: list[dict[str, Any]], make_tiny_base: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    export(make_tiny_base, folder, "fp16")
    assert [of["attentions"] for of in told] == [0, 2 * LAYERS, 0]
    assert [bool(of["refittable"]) for of in told] == [False, True, False]
    # Timings are kept beside bundles, by version and GPU.
    (cache,) = {of["cache"] for of in told}
    assert cache == tmp_path / ".cache" / "trt-11.4.0.106-NVIDIA-H100-80GB-HBM3"
    # The plan of the denoiser holds no weights of its products: they lie beside it.
    names = {path.name for path in folder.iterdir()}
    assert {f"denoiser{ending}" for ending in (".engine", ".json", ".safetensors")} <= names
    assert "encoder.safetensors" not in names
    judge_adapters(make_tiny_base, folder, "fp16")
    refuse_what_is_damaged(folder)


def test_in_fp32_attention_may_be_decomposed(
    told: list[dict[str, Any]], make_tiny_base: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    base = make_tiny_base(layers=1)
    program, _ = freeze(base, "denoiser", frames=5, size=(32, 32), word="mask")
    trt.build(program, folder / "denoiser.engine", precision="fp32")
    (of,) = told
    assert of["decomposable"] == of["attentions"] == 2
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


def judge_adapters(make: Callable[..., Any], folder: Path, precision: str) -> None:
    """Add a second adapter, and compare the answers with both and with none."""
    base = make(layers=LAYERS)
    two = "two", draw_adapter(make(layers=LAYERS), 2)
    shared: Any = {"recipe": RECIPE, "prompt": base.embed("mask"), "folder": folder, "origin": {}}
    list(add_adapter(base, two, **shared))
    predictor = open_bundle(folder)
    for name, seed in (("one", 1), ("two", 2), ("one", 1)):
        merged = make(layers=LAYERS)
        draw_adapter(make(layers=LAYERS), seed).merge(merged)
        predictor.use(name)
        expected = {"image": eager_predictor(merged, RECIPE).answer(pictures(2))}
        found = {"image": predictor.answer(pictures(2))}
        require(compare(expected, found), role=name, tolerance=precision)


def refuse_what_is_damaged(folder: Path) -> None:
    """Damage files, and open the engine by itself: a bundle would see that they were changed."""
    roles = read_manifest(folder)["roles"]
    signature = Signature.from_dict(roles["denoiser"]["signature"])
    for name in ("denoiser.safetensors", "denoiser.json"):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(bytes(len(content)))
        with pytest.raises(ModelError, match=rf"{name} is damaged \(.* Export it again"):
            trt.load(folder / "denoiser.engine", signature)
        path.write_bytes(content)
    path.write_bytes(content.replace(b"11.4.0.106", b"11.5.0.106"))
    with pytest.raises(EngineError, match=r"built for TensorRT 11\.5\S+, and here it is 11\.4"):
        trt.load(folder / "denoiser.engine", signature)
