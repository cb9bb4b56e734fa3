"""TensorRT: a program as an engine for one model of GPU and one version of TensorRT.

Beside an engine lie what it was built for, and, for the denoiser, the weights that adapters change
and what the engine must answer with them.
"""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.export.engine import AGAIN, Examples, missing_package, require_device
from fewshot_rt.files import write_json
from fewshot_rt.predictor import Runner
from fewshot_rt.spec import Signature

if TYPE_CHECKING:
    import numpy as np

    from fewshot_rt.export.onnx_trt import Site
    from fewshot_rt.export.program import Program
    from fewshot_rt.export.trt_declare import Declared
    from fewshot_rt.export.trt_runtime import EngineRunner

name = "trt"
precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")
suffix = ".engine"
is_live = True
is_fixed = True
coders = {"int8": "fp16", "fp8": "bf16"}
tiny: tuple[str, ...] = ()
calibrated: tuple[str, ...] = ("int8", "fp8")
hints: tuple[str, ...] = ()
# Adapters are merged before these are built: TensorRT rounds weights when it builds, once for all.
merged: tuple[str, ...] = ("int8", "fp8")

LEAST_VERSION = (10, 14)  # the first with IAttention, and with Attention in its ONNX parser
INSTALL = "fewshot-rt[trt]"
FACTS_SUFFIX, WEIGHTS_SUFFIX = ".json", ".safetensors"
CACHE = ".cache"  # beside the bundle: how long kernels take, for builds to come
SEED = 7  # of the example that an engine must answer as eager does


def missing() -> str | None:
    """Say why it cannot run here and what to install; None if it can."""
    reason = missing_package("tensorrt", install=INSTALL)
    if reason:
        return reason
    try:
        found = tuple(int(part) for part in version("tensorrt").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return None  # installed in another way; building and opening will tell
    if found < LEAST_VERSION:
        return (
            f"TensorRT {'.'.join(map(str, found))} is too old, it takes "
            f"{'.'.join(map(str, LEAST_VERSION))}. Install {INSTALL}."
        )
    return None


def devices() -> tuple[str, ...]:
    """List the kinds of device that it can run on."""
    return ("cuda",)


def build(program: "Program", path: Path, *, precision: str, examples: Examples = ()) -> None:
    """Build an engine for the GPU at hand, and write beside it what opening it takes.

    examples: what int8 and fp8 find their scales on.
    Raises: EngineError if the program is not on a GPU, or TensorRT cannot build it.
    """
    from fewshot_rt.export.trt_choice import Measured

    require_gpu(program.device)
    choose = Measured(program.device, cache=cache_beside(path, program.device))
    build_with(choose, program, path, precision=precision, examples=examples)


def cache_beside(path: Path, device: str) -> Path:
    """Say where it is kept how long kernels take: beside the folder of an engine."""
    from fewshot_rt.export.trt_runtime import facts_here

    facts = facts_here(device)
    name = f"trt-{facts['TensorRT']}-{facts['GPU']}".replace(" ", "-")
    return path.parent.parent / CACHE / name


def build_with(
    choose: "Callable[[Site], bool]",
    program: "Program",
    path: Path,
    *,
    precision: str,
    examples: Examples = (),
) -> None:
    """Build an engine as `build` does. choose: says at which attentions our kernel is to run.

    Raises: EngineError if TensorRT cannot build it.
    """
    import torch

    from fewshot_rt.export.onnx_trt import allow_decomposition, put_plugin, read_model, write_model
    from fewshot_rt.export.trt_declare import declare
    from fewshot_rt.export.trt_network import build_plan, version_here
    from fewshot_rt.export.trt_plugin import register
    from fewshot_rt.export.trt_runtime import facts_here

    with TemporaryDirectory(dir=path.parent) as folder:
        declared = declare(
            program, Path(folder), precision=precision, examples=examples, version=version_here()
        )
        model = read_model(declared.path)
        ours = 0
        if precision == "fp32":
            allow_decomposition(model)
        else:
            ours = put_plugin(model, choose)
        if ours:
            register()
        write_model(model, declared.path)
        torch.cuda.empty_cache()  # TensorRT takes its memory from the driver
        plan = build_plan(
            declared.path,
            program.signature,
            role=program.role,
            refittable=[slot.name for slot in declared.slots.values()],
            attentions=declared.attentions - ours,
            cache=cache_beside(path, program.device),
        )
    path.write_bytes(plan)
    write_beside(path, program, declared, facts=facts_here(program.device), precision=precision)


def load(
    path: Path, signature: Signature, *, device: str = "cpu", threads: int | None = None
) -> Runner:
    """Open an engine.

    Raises: EngineError if the device is no GPU or is not there, a number of threads is asked for,
    the engine was built for another GPU or version, or it answers otherwise than when it was built;
    ModelError if a file is damaged.
    """
    from fewshot_rt.export.trt_runtime import EngineRunner, open_engine, require_facts

    require_device(name, device, threads)
    require_gpu(device)
    said = read_facts(path)
    require_facts(said["facts"], device=device)
    runner = EngineRunner(open_engine(path, device=device), signature, device=device)
    if said["slots"]:
        make_live(runner, path, signature, said)
    return runner


def require_gpu(device: str) -> None:
    """Require that a device is a GPU. Raises: EngineError."""
    if device.partition(":")[0] != "cuda":
        raise EngineError(f"engine 'trt' is for GPUs, not for {device!r}. Add --device cuda.")


def make_live(
    runner: "EngineRunner", path: Path, signature: Signature, said: Mapping[str, Any]
) -> None:
    """Give an engine the base's weights, and let adapters change them.

    Raises: EngineError if it answers otherwise than when it was built; ModelError if the file of
    weights is damaged.
    """
    from safetensors import SafetensorError, safe_open

    from fewshot_rt.export.trt_refit import RefitWeights, Slot

    place = path.with_suffix(WEIGHTS_SUFFIX)
    try:
        file = safe_open(place, "pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{place} is damaged ({error}). {AGAIN}") from error
    example = signature.example(seed=SEED)
    runner.live = RefitWeights(
        file.get_tensor,
        {weight: Slot(**slot) for weight, slot in said["slots"].items()},
        push=runner.push,
        answer=lambda: runner(example),
        answers=path.with_suffix(""),
        tolerance=said["precision"],
    )
    runner.live.fill()


def write_beside(
    path: Path,
    program: "Program",
    declared: "Declared",
    *,
    facts: Mapping[str, str],
    precision: str,
) -> None:
    """Write what opening an engine takes: facts, weights, and how eager answers an example."""
    from safetensors.torch import save_file

    from fewshot_rt.export.live import compact
    from fewshot_rt.export.trt_refit import BASE, write_answer

    slots = {weight: vars(slot) for weight, slot in declared.slots.items()}
    said = {"facts": dict(facts), "precision": precision, "slots": slots}
    write_json(path.with_suffix(FACTS_SUFFIX), said)
    if slots:
        known = {**program.exported.constants, **program.exported.state_dict}
        tensors = {weight: compact(known[weight].detach()).cpu() for weight in slots}
        save_file(tensors, path.with_suffix(WEIGHTS_SUFFIX))
        write_answer(path.with_suffix(""), BASE, answer_eagerly(program))


def answer_eagerly(program: "Program") -> "dict[str, np.ndarray]":
    """Answer the example with the captured program."""
    import torch

    from fewshot_rt.roles import run_eagerly

    signature, device = program.signature, torch.device(program.device)
    eager = run_eagerly(program.exported.module(), signature, device=device)
    return eager(signature.example(seed=SEED))


def read_facts(path: Path) -> dict[str, Any]:
    """Read what an engine was built for. Raises: ModelError if the file is damaged."""
    place = path.with_suffix(FACTS_SUFFIX)
    try:
        said: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        return {key: said[key] for key in ("facts", "precision", "slots")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{place} is damaged ({error!r}). {AGAIN}") from error
