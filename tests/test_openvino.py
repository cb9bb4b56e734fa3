"""OpenVINO. References: the eager role in fp32, and OpenVINO's own list of what it executes."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from tiny.bundles import freeze, frozen_roles
from tiny.families import FAMILIES

from fewshot_rt.bases import open_base
from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.export import nncf as quantiser
from fewshot_rt.export.engines import openvino as engine
from fewshot_rt.export.parity import compare, require
from fewshot_rt.export.program import Program
from fewshot_rt.predictor import Runner
from fewshot_rt.spec import ROLES

BATCH = 3
LINEAR = 10  # of a block: eight around two attentions, two of the feed-forward net


@pytest.fixture(scope="module")
def frozen(make_tiny_base: Callable[..., Any]) -> Callable[[str], tuple[Program, Runner]]:
    """A function that gives the program of a role, and the eager runner that is its reference."""
    return frozen_roles(make_tiny_base())


@pytest.fixture(scope="module")
def built(frozen: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function that builds a role in a precision."""
    folder, made = tmp_path_factory.mktemp("openvino"), {}

    def build(role: str, precision: str) -> Path:
        if (role, precision) not in made:
            path = made[role, precision] = folder / f"{role}-{precision}.xml"
            program = frozen(role)[0]
            given = examples(program) if precision == "int8" else ()
            engine.build(program, path, precision=precision, examples=given)
        return made[role, precision]

    return build


def examples(program: Program) -> list[dict[str, np.ndarray]]:
    return [program.signature.example(seed=seed, batch=BATCH) for seed in range(4)]


def executed(path: Path, program: Program) -> Counter[str]:
    """Count what is executed, by type and precision, as OpenVINO tells it."""
    runner: Any = engine.load(path, program.signature)
    runner(program.signature.example(seed=0, batch=2))
    (compiled,) = (
        cell.cell_contents
        for cell in runner.__closure__
        if isinstance(cell.cell_contents, engine.Compiled)
    )
    (request,) = compiled.requests.values()
    found: Counter[str] = Counter()
    for node in request.get_compiled_model().get_runtime_model().get_ops():
        said = node.get_rt_info()
        found[f"{said['layerType'].astype(str)} {said['runtimePrecision'].astype(str)}"] += 1
    return found


@pytest.mark.parametrize("role", ROLES)
def test_every_role_agrees_with_eager_at_every_batch(role: str, frozen: Any, built: Any) -> None:
    """In fp32 to 1e-5, although OpenVINO would take bf16 by itself."""
    program, eager = frozen(role)
    runner = engine.load(built(role, "fp32"), program.signature)
    for batch in (1, 3, 2):
        given = program.signature.example(seed=batch, batch=batch)
        require(compare(eager(given), runner(given)), role=role, tolerance="fp32")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_eager(
    family: str, make_text_encoder: Any, tmp_path: Path
) -> None:
    write, size, frames = FAMILIES[family]
    base = open_base(str(write(tmp_path, make_text_encoder)), weights="fp32")
    program, eager = freeze(base, "denoiser", size=size, frames=frames)
    path = tmp_path / "denoiser.xml"
    engine.build(program, path, precision="fp32")
    kinds = Counter(node.get_type_name() for node in openvino.Core().read_model(path).get_ops())
    attention = [n for n in program.exported.graph.nodes if "scaled_dot" in str(n.target)]
    assert kinds["ScaledDotProductAttention"] == len(attention) > 0
    runner = engine.load(path, program.signature)
    for batch in (1, 2):
        given = program.signature.example(seed=batch, batch=batch)
        require(compare(eager(given), runner(given)), role="denoiser", tolerance="fp32")


@pytest.mark.parametrize(
    ("role", "precision"),
    [("denoiser", "bf16"), ("decoder", "bf16"), *((role, "int8") for role in ROLES)],
)
def test_fewer_bits_are_near_and_are_what_is_executed(
    role: str, precision: str, frozen: Any, built: Any
) -> None:
    program, eager = frozen(role)
    path = built(role, precision)
    runner = engine.load(path, program.signature)
    (name,) = (spec.name for spec in program.signature.outputs)
    for case in examples(program):
        parity = compare(eager(case), runner(case))
        require(parity, role=role, tolerance=precision)
        assert parity[name].rel_l2 > 1e-5, "nothing was rounded"
    found = executed(path, program)
    wanted = {"bf16": (" bf16",), "int8": (" u8", " i8")}[precision]  # of tokens
    products = sum(
        n
        for kind, n in found.items()
        if kind.startswith(("FullyConnected", "MatMul", "Convolution")) and kind.endswith(wanted)
    )
    assert products >= (LINEAR if role == "denoiser" else 3), found


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_times_stay_in_fp32(precision: str, frozen: Any, built: Any) -> None:
    """In bf16 750 thousandths would be 752, and the angles of their sines as wrong."""
    program, eager = frozen("denoiser")
    runner = engine.load(built("denoiser", precision), program.signature)
    for time in (0.75, 0.83, 0.9):
        case = examples(program)[0]
        case["time"] = np.full_like(case["time"], time)
        require(compare(eager(case), runner(case)), role="denoiser", tolerance=precision)


def test_fp32_stays_in_fp32(frozen: Any, built: Any) -> None:
    found = executed(built("denoiser", "fp32"), frozen("denoiser")[0])
    assert not [kind for kind in found if "bf16" in kind or "f16" in kind]


@pytest.mark.parametrize("role", ROLES)
def test_a_layer_outside_of_blocks_is_not_in_int8(role: str, built: Any) -> None:
    inside = re.compile(r"\.blocks\." if role == "denoiser" else rf"\.{role}\.\d+\b")
    model = openvino.Core().read_model(built(role, "int8"))
    takers = [
        taker.get_node().get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() == "FakeQuantize"
        for taker in node.output(0).get_target_inputs()
    ]
    assert takers
    assert all(inside.search(name) for name in takers), takers


@pytest.mark.parametrize("role", ROLES)
def test_images_side_by_side_have_the_answers_that_they_have_alone(
    role: str, frozen: Any, built: Any
) -> None:
    program, _ = frozen(role)
    runner = engine.load(built(role, "fp32"), program.signature, threads=2, hint="throughput")
    alone = engine.load(built(role, "fp32"), program.signature)
    for seed in range(3):
        given = program.signature.example(seed=seed, batch=BATCH)
        found, expected = runner(given), alone(given)
        for name, tensor in expected.items():
            assert found[name].shape == tensor.shape
        require(compare(expected, found), role=role, tolerance="fp32")


def test_one_call_does_not_write_into_the_answer_of_another(frozen: Any, built: Any) -> None:
    program, eager = frozen("decoder")
    runner = engine.load(built("decoder", "fp32"), program.signature, threads=1)
    cases = [program.signature.example(seed=seed, batch=2) for seed in range(3)]
    found = [runner(case) for case in cases]
    for case, answer in zip(cases, found, strict=True):
        require(compare(eager(case), answer), role="decoder", tolerance="fp32")


def test_what_is_not_there_is_refused(
    frozen: Any, built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = frozen("decoder")[0]
    with pytest.raises(EngineError, match="has no device 'cuda' here: there is cpu"):
        engine.load(built("decoder", "fp32"), program.signature, device="cuda")
    with pytest.raises(EngineError, match="finds the scales of int8 on the images"):
        engine.build(program, tmp_path / "a.xml", precision="int8")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "CAPABILITIES", {"bf16": {"NONE"}, "int8": {"INT8", "NONE"}})
        for precision, said in (("bf16", "none"), ("int8", "int8 and none")):
            path = built("decoder", precision)
            with pytest.raises(EngineError, match=f"no arithmetic in {said}. Choose fp32"):
                engine.build(program, tmp_path / "a.xml", precision=precision)
            with pytest.raises(EngineError, match=f"no arithmetic in {said}. Choose fp32"):
                engine.load(path, program.signature)
    monkeypatch.setattr(quantiser, "missing_package", lambda *_, install: f"Install {install}.")
    with pytest.raises(EngineError, match=r"cannot build int8: Install fewshot-rt\[openvino\]"):
        engine.build(program, tmp_path / "a.xml", precision="int8", examples=examples(program))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["empty", "noise", "absent", "no weights", "foreign"])
def test_damaged_files_say_so(damage: str, frozen: Any, built: Any, tmp_path: Path) -> None:
    source, path = built("decoder", "fp32"), tmp_path / "decoder.xml"
    weights = path.with_suffix(".bin")
    weights.write_bytes(source.with_suffix(".bin").read_bytes())
    path.write_text(source.read_text())
    if damage == "absent":
        path.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "foreign":  # another's model does not say its precision
        path.write_text(source.read_text().replace("fewshot-rt", "another"))
    else:
        path.write_text({"empty": "", "noise": "no model"}[damage])
    with pytest.raises(ModelError, match=r"decoder\.xml is damaged .*Export it again"):
        engine.load(path, frozen("decoder")[0].signature)


def test_opening_needs_neither_torch_nor_a_network(frozen: Any, built: Any, tmp_path: Path) -> None:
    signature = frozen("decoder")[0].signature
    script = f"""
import sys
from pathlib import Path
from fewshot_rt.export.engines import openvino as engine
from fewshot_rt.spec import Signature
signature = Signature.from_dict({signature.to_dict()!r})
runner = engine.load(Path({str(built("decoder", "fp32"))!r}), signature)
runner(signature.example(seed=1))
heavy = {{"torch", "nncf", "onnx", "openvino_telemetry"}} & set(sys.modules)
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
