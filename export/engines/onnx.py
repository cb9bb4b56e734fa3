"""ONNX Runtime: a program as an ONNX file, run without PyTorch."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewshot_rt import __version__
from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.export.engine import make_runner, missing_package
from fewshot_rt.predictor import Runner
from fewshot_rt.spec import Signature

if TYPE_CHECKING:
    from fewshot_rt.export.program import Program

name = "onnx"
precisions: tuple[str, ...] = ("fp32",)
suffix = ".onnx"
is_live = False

# The first with whole Attention and RMSNormalization: on a CPU, pocket's denoiser is a little
# faster than with the decomposed ones of opset 18, at the same error.
OPSET = 23
# A protobuf holds at most 2 GiB, graph included; larger weights go to a file beside it.
LARGEST_INLINE_BYTES = 1_900_000_000
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# These say, at every export, that torchvision is absent and that a Split was not folded.
CHATTY_LOGGERS = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer")


def missing() -> str | None:
    """Say why it cannot run here and what to install; None if it can."""
    return missing_package("onnxruntime", install="onnxruntime, or onnxruntime-gpu")


def build(program: "Program", path: Path, *, precision: str) -> None:  # noqa: ARG001
    """Write a program as an ONNX file, its axes named as in the signature, and check it.

    precision: that of the program, fp32. Weights above 1.9 GB go to `path` + ".data".
    Raises: EngineError if an operator has no ONNX form, or onnx or onnxscript are not installed.
    """
    for package in ("onnx", "onnxscript"):
        reason = missing_package(package, install=f"{package}; only export needs it")
        if reason:
            raise EngineError(f"engine 'onnx' cannot build: {reason}")
    import onnx
    import torch

    signature = program.signature
    with _quiet():
        try:
            exported = torch.onnx.export(
                program.exported,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise EngineError(f"the {program.role} has no ONNX form: {error}") from error
    assert exported is not None  # with dynamo=True it never is
    _tidy(exported.model, signature)
    exported.model.metadata_props.update({"fewshot-rt": __version__, "role": program.role})
    exported.save(path, external_data=program.size_bytes > LARGEST_INLINE_BYTES)
    onnx.checker.check_model(str(path))


def load(
    path: Path, signature: Signature, *, device: str = "cpu", threads: int | None = None
) -> Runner:
    """Open an ONNX file on one device; operators never move to another one quietly.

    Raises: EngineError if the device is not there, ModelError if the file is damaged.
    """
    import onnxruntime

    session_type, errors = onnxruntime.InferenceSession, _load_errors()
    try:
        session = session_type(str(path), _options(threads), providers=_providers(device))
    except errors as error:
        raise ModelError(f"{path} is damaged ({error}). Export it again.") from error
    names = [spec.name for spec in signature.inputs]
    outputs = [spec.name for spec in signature.outputs]

    def run(tensors: list[np.ndarray]) -> list[np.ndarray]:
        results: list[np.ndarray] = session.run(outputs, dict(zip(names, tensors, strict=True)))
        return results

    return make_runner(signature, run)


def _options(threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors; they are raised as well
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _providers(device: str) -> list[str | tuple[str, dict[str, str]]]:
    """Give the one provider of a device such as "cpu", "cuda" or "cuda:1"."""
    import onnxruntime

    kind, _, index = device.partition(":")
    if kind not in PROVIDERS:
        raise EngineError(f"engine 'onnx' has no device {device!r}: choose one of: cpu, cuda.")
    provider, present = PROVIDERS[kind], onnxruntime.get_available_providers()
    if provider not in present:
        raise EngineError(
            f"engine 'onnx' cannot run on {device!r} here: this onnxruntime has "
            f"{', '.join(present)}. Install fewshot-rt[cuda], or use device 'cpu'."
        )
    return [(provider, {"device_id": index})] if index else [provider]


def _load_errors() -> tuple[type[Exception], ...]:
    """Give what ONNX Runtime raises for a file that it cannot read; these share no parent."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidProtobuf", "InvalidGraph", "NoSuchFile", "NoModel")
    return tuple(getattr(state, name) for name in names)


def _tidy(model: Any, signature: Signature) -> None:
    """Name the axes that vary, which torch.export numbers (s0, s1), as the signature does.

    Notes on where each node came from are left out: of a small model they are half of the file.
    """
    graph = model.graph
    for annotated in (graph, *graph):
        annotated.metadata_props.clear()
    known = {value.name: value for value in graph.inputs}
    renamed = {
        str(known[spec.name].shape[position]): axis
        for spec in signature.inputs
        for position, axis in signature.varying(spec)
    }
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        for position, size in enumerate(value.shape or ()):
            if str(size) in renamed:
                value.shape[position] = renamed[str(size)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what is known of the exporter and says nothing about the model."""
    loggers = [logging.getLogger(name) for name in CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # torch's own use of its own deprecated class.
        warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
