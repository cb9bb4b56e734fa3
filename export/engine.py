"""What an engine is: a program to a file, and a file to a runner. One module of `engines` each."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from fewshot_rt.discover import load_module, module_names
from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.predictor import Runner
from fewshot_rt.spec import Signature

if TYPE_CHECKING:
    from .program import Program

ENGINES = "fewshot_rt.export.engines"
Examples = Sequence[Mapping[str, np.ndarray]]
# Fastest first at one image a call, by the records of `bench` on a processor; on a GPU they have
# not been compared yet. Each with the precisions that it has on such a device.
FASTEST = {
    "cpu": {
        "openvino": ("fp32", "bf16", "int8"),
        "onnx": ("fp32", "int8"),
        "aoti": ("fp32", "bf16", "int8"),
        "eager": ("fp32",),
    },
    "cuda": {
        "trt": ("fp32", "fp16", "bf16", "int8", "fp8"),
        "aoti": ("fp32", "bf16", "fp8"),
        "onnx": ("fp32", "fp16", "bf16"),
        "eager": ("fp32",),
    },
}
AGAIN = "Export it again: fewshot-rt export."


class Engine(Protocol):
    """Turns a program into a file and a file into a runner; a module of `engines` is one.

    name: its own name. precisions: those that `build` takes. suffix: of the files that it writes.
    is_live: whether its runners have `live` weights (`fewshot_rt.export.live.LiveWeights`), into
    which adapters are merged after loading. merged: precisions in which they are merged before
    building all the same. is_fixed: whether it builds for full batches alone.
    coders: the precision of encoder and decoder beside a denoiser's, where it is another.
    tiny: precisions that a tiny autoencoder takes all the same.
    calibrated: precisions whose scales `build` finds on examples. hints: what `load` can be told to
    favour, as `hint`.
    """

    name: str
    precisions: tuple[str, ...]
    suffix: str
    is_live: bool
    merged: tuple[str, ...]
    is_fixed: bool
    coders: Mapping[str, str]
    tiny: tuple[str, ...]
    calibrated: tuple[str, ...]
    hints: tuple[str, ...]

    def missing(self) -> str | None:
        """Say why it cannot run here and what to install, as two sentences; None if it can."""
        ...

    def devices(self) -> tuple[str, ...]:
        """List the kinds of device that it can run on here, where it is not missing."""
        ...

    def build(
        self, program: "Program", path: Path, *, precision: str, examples: Examples = ()
    ) -> None:
        """Write a program as a file; large weights may lie in further files beside it.

        examples: what the role is given when it answers real images; for `calibrated` precisions.
        Raises: EngineError if the program cannot be built, or examples are missing.
        """
        ...

    def load(
        self, path: Path, signature: Signature, *, device: str = "cpu", threads: int | None = None
    ) -> Runner:
        """Open a file as a runner. threads: of one call; None leaves it to the engine.

        Raises: EngineError if the device is not there, ModelError if the file is damaged.
        """
        ...


def engine_names() -> tuple[str, ...]:
    """List the engines there are, whether or not they can run here."""
    return module_names(ENGINES)


def get_engine(name: str) -> Engine:
    """Find an engine by name, whether or not it can run here.

    Raises: ConfigError with the nearest name if there is no such engine.
    """
    return cast(Engine, load_module(ENGINES, name, kind="engine"))


def available_engines() -> tuple[str, ...]:
    """List the engines that can run here."""
    return tuple(name for name in engine_names() if get_engine(name).missing() is None)


def require_engine(name: str) -> Engine:
    """Find an engine that can run here.

    Raises: ConfigError if there is no such engine, EngineError if it cannot run here.
    """
    engine = get_engine(name)
    reason = engine.missing()
    if reason is not None:
        others = ", ".join(available_engines()) or "none"
        raise EngineError(
            f"engine {name!r} cannot run here: {reason.rstrip('.')}, or choose one of: {others}."
        )
    return engine


def fastest_engine(device: str, precision: str = "fp32") -> str:
    """Choose the engine that answers fastest, as measured, among those that can build here.

    Raises: EngineError if none can.
    """
    for name, precisions in FASTEST["cuda" if device.startswith("cuda") else "cpu"].items():
        needs_compiler = name == "aoti" and missing_compiler()
        if precision in precisions and not get_engine(name).missing() and not needs_compiler:
            return name
    raise EngineError(
        f"no engine can build {precision} for {device!r} here. See `fewshot-rt doctor`."
    )


def missing_package(package: str, *, install: str) -> str | None:
    """Say that a package is not installed and what to install for it; None if it is there."""
    if find_spec(package) is not None:
        return None
    return f"the package {package!r} is not installed. Install {install}."


def require_examples(engine: str, precision: str, examples: Sequence[object]) -> None:
    """Require examples to find scales on. Raises: EngineError if there are none."""
    if not examples:
        raise EngineError(
            f"engine {engine!r} finds the scales of {precision} on the images that a run was "
            "trained on, and there are none. Put them back, or choose another precision."
        )


def missing_compiler() -> str | None:
    """Say that PyTorch finds no C++ compiler and what to install; None if it does."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler):
        return None
    return f"there is no C++ compiler {compiler!r}. Install one, or name yours in CXX."


def torch_devices() -> tuple[str, ...]:
    """List the devices of engines in PyTorch."""
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def require_device(engine: str, device: str, threads: int | None) -> None:
    """Require of an engine in PyTorch that a device is there, and no number of threads asked for.

    Raises: EngineError.
    """
    import torch

    if threads is not None:
        raise EngineError(
            f"engine {engine!r} cannot keep to {threads} threads by itself: PyTorch has one number "
            "for the whole process. Set OMP_NUM_THREADS, or choose engine 'onnx'."
        )
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"device {device!r} is not there: PyTorch sees no GPU. Use device 'cpu'.")


def require_same(facts: Mapping[str, str], here: Mapping[str, str], *, made: str) -> None:
    """Require that what a file was made for is here. made: its subject and verb, for the message.

    Raises: EngineError that says what differs.
    """
    for name, made_for in facts.items():
        if here.get(name) != made_for:
            raise EngineError(
                f"this {made} for {name} {made_for}, and here it is {here.get(name)}. {AGAIN}"
            )


def make_runner(
    signature: Signature, run: Callable[[list[np.ndarray]], Sequence[np.ndarray]]
) -> Runner:
    """Wrap a function of arrays, in the signature's order, as a runner that checks its inputs."""

    def runner(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        signature.check(tensors)
        for spec in signature.inputs:
            if tensors[spec.name].dtype != spec.dtype:
                raise ModelError(
                    f"{spec.name}: expected {spec.dtype}, got {tensors[spec.name].dtype}"
                )
        results = run([tensors[spec.name] for spec in signature.inputs])
        return {spec.name: r for spec, r in zip(signature.outputs, results, strict=True)}

    return runner
