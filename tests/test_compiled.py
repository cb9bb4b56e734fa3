"""The engines that compile: AOTInductor and TorchInductor, on the CPU.

References: the eager role that was captured; for the files, what a damaged or foreign one must say.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.bundles import freeze
from tiny.families import FAMILIES

from fewshot_rt.bases import open_base
from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.export import compiled
from fewshot_rt.export.engine import get_engine
from fewshot_rt.export.engines import aoti, inductor
from fewshot_rt.export.parity import compare, require
from fewshot_rt.export.program import Program
from fewshot_rt.predictor import Runner

BATCH = 3


def check(program: Program, eager: Runner, runner: Runner, precision: str) -> None:
    for batch in range(1, BATCH + 1):
        given = program.signature.example(seed=batch, batch=batch)
        require(compare(eager(given), runner(given)), role=program.role, tolerance=precision)


@pytest.fixture(scope="module")
def decoder(make_tiny_base: Callable[..., Any]) -> tuple[Program, Runner]:
    return freeze(make_tiny_base(), "decoder", size=(32, 32), frames=5)


@pytest.fixture(scope="module")
def decoder_file(decoder: tuple[Program, Runner], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "decoder.aoti"
    aoti.build(decoder[0], path, precision="fp32")
    return path


def test_a_package_answers_at_every_batch(
    decoder: tuple[Program, Runner], decoder_file: Path
) -> None:
    check(*decoder, aoti.load(decoder_file, decoder[0].signature), "fp32")


# Of each family one way with torch's attention, one with ours; of the two Wans, one with ours.
SAMPLED = {(family, "inductor", False) for family in FAMILIES} | {
    (family, "aoti", True) for family in FAMILIES if family != "wan 2.1"
}


@pytest.mark.parametrize(
    ("family", "engine", "ours"),
    [
        pytest.param(*way, marks=() if way in SAMPLED else pytest.mark.exhaustive)
        for way in product(FAMILIES, ("inductor", "aoti"), (False, True))
    ],
)
def test_every_family_compiles(
    family: str,
    engine: str,
    ours: bool,
    tmp_path: Path,
    make_text_encoder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With torch's attention, and with ours, which has norms and rotary embeddings in it."""
    if ours:
        everywhere = partial(compiled.prepare, ours=lambda _: True, normed=True)
        monkeypatch.setattr(compiled, "prepare", everywhere)
    write, size, frames = FAMILIES[family]
    base = open_base(str(write(tmp_path / "base", make_text_encoder)))
    program, eager = freeze(base, "denoiser", size=size, frames=frames)
    tool = get_engine(engine)
    path = tmp_path / f"denoiser{tool.suffix}"
    tool.build(program, path, precision="fp32")
    check(program, eager, tool.load(path, program.signature), "fp32")


def test_a_program_for_an_earlier_pytorch_is_traced_once_more(
    decoder: tuple[Program, Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "KNOWS_SIZES", (99, 0))
    path = tmp_path / "decoder.inductor"
    inductor.build(decoder[0], path, precision="fp32")
    check(*decoder, inductor.load(path, decoder[0].signature), "fp32")


def test_a_package_starts_where_there_is_no_compiler(
    decoder: tuple[Program, Runner], decoder_file: Path, tmp_path: Path
) -> None:
    program, eager = decoder
    given = program.signature.example(seed=1, batch=2)
    np.save(tmp_path / "given.npy", given["latents"])
    (tmp_path / "signature.json").write_text(json.dumps(program.signature.to_dict()))
    code = f"""
import json, sys
from pathlib import Path
import numpy as np
from fewshot_rt.export.engine import get_engine
from fewshot_rt.spec import Signature
folder = Path({str(tmp_path)!r})
signature = Signature.from_dict(json.loads((folder / "signature.json").read_text()))
assert get_engine("inductor").missing().startswith("there is no C++ compiler")
assert get_engine("aoti").missing() is None
runner = get_engine("aoti").load(Path({str(decoder_file)!r}), signature)
np.save(folder / "found.npy", runner({{"latents": np.load(folder / "given.npy")}})["image"])
heavy = {{"diffusers", "peft", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {"PATH": "", "CXX": "none", "HOME": str(tmp_path)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    found = {"image": np.load(tmp_path / "found.npy")}
    require(compare(eager(given), found), role="decoder", tolerance="fp32")


def test_building_without_a_compiler_says_so(
    decoder: tuple[Program, Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EngineError, match="engine 'aoti' cannot build: there is no C"):
        aoti.build(decoder[0], tmp_path / "decoder.aoti", precision="fp32")
    assert get_engine("inductor").missing() is not None


def test_weights_lie_outside_and_in_half_the_bits(
    decoder: tuple[Program, Runner], decoder_file: Path
) -> None:
    weights = load_file(decoder_file.with_suffix(".safetensors"))
    exported = decoder[0].exported
    assert set(weights) == {*exported.state_dict, *exported.constants}
    # The code alone: it holds none of the weights' bytes.
    content = decoder_file.read_bytes()
    largest = max(weights.values(), key=torch.Tensor.numel)
    assert largest.numpy().tobytes()[:64] not in content


def test_what_was_compiled_for_something_else_is_refused(
    decoder: tuple[Program, Runner], decoder_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature, facts = decoder[0].signature, compiled.facts_of("cpu")
    assert set(facts) == {"torch", "device", "cpu"}
    for name, other in (("torch", "9.9.9"), ("cpu", "ABACUS"), ("device", "cuda")):
        monkeypatch.setattr(compiled, "facts_of", lambda _, o=other, n=name: facts | {n: o})
        with pytest.raises(EngineError, match=f"compiled for {name} .*, and here it is {other}"):
            aoti.load(decoder_file, signature)


def test_a_damaged_file_says_so(
    decoder: tuple[Program, Runner], decoder_file: Path, tmp_path: Path
) -> None:
    signature = decoder[0].signature
    weights = decoder_file.with_suffix(".safetensors")
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    for name in ("decoder.aoti", "decoder.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "decoder.aoti").write_bytes(decoder_file.read_bytes())
        (folder / "decoder.safetensors").write_bytes(weights.read_bytes())
        (folder / name).write_bytes(b"no")
        with pytest.raises(ModelError, match=rf"{name} is damaged .*Export it again"):
            aoti.load(folder / "decoder.aoti", signature)
    without_plan = tmp_path / "plan"
    without_plan.mkdir()
    save_file(
        load_file(weights), without_plan / "decoder.safetensors", {"facts": metadata["facts"]}
    )
    with pytest.raises(ModelError, match=r"decoder\.safetensors is damaged \('plan'\)"):
        aoti.load(without_plan / "decoder.aoti", signature)


@pytest.mark.parametrize("engine", ["aoti", "inductor"])
def test_threads_and_devices_are_not_promised(
    engine: str, decoder: tuple[Program, Runner], decoder_file: Path
) -> None:
    signature = decoder[0].signature
    with pytest.raises(EngineError, match=f"engine '{engine}' cannot keep to 2 threads"):
        get_engine(engine).load(decoder_file, signature, threads=2)
    if torch.cuda.is_available():
        pytest.skip("this PyTorch has CUDA, so asking for it is no error")
    with pytest.raises(EngineError, match="device 'cuda' is not there"):
        get_engine(engine).load(decoder_file, signature, device="cuda")


def test_a_precision_that_this_device_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(EngineError, match=r"fp8 is for GPUs\. On a processor choose int8 or bf16"):
        compiled.require_precision("fp8", "cpu")
    monkeypatch.setattr(compiled, "has_fast_bf16", lambda: False)
    compiled.require_precision("fp32", "cpu")
    with pytest.raises(EngineError, match="no arithmetic in bf16, which int8 needs"):
        compiled.require_precision("int8", "cpu")
    for capability, precision, message in (
        ((9, 0), "int8", "int8 is for processors"),
        ((8, 0), "fp8", "compute capability 8.9 or later, and here it is 8.0"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        with pytest.raises(EngineError, match=message):
            compiled.require_precision(precision, "cuda")
