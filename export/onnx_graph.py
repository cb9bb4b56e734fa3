"""A program as an ONNX graph: the one that ONNX Runtime, TensorRT and OpenVINO are given."""

import logging
import re
import warnings
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewshot_rt import __version__
from fewshot_rt.errors import EngineError
from fewshot_rt.spec import Signature

from .engine import missing_package

if TYPE_CHECKING:
    import numpy as np

    from .program import Program

# The first with whole Attention and RMSNormalization: on a CPU, pocket's denoiser is a little
# faster than with the decomposed ones of opset 18, at the same error.
OPSET = 23
# A protobuf holds at most 2 GiB, graph included; larger weights go to a file beside it.
LARGEST_INLINE_BYTES = 1_900_000_000
DATA_SUFFIX = ".data"
# What the layers that take int8 are called, by what they are: those of a denoiser's blocks, and
# those of a tiny autoencoder, which are one list; not its shortcut, which carries most of what is
# seen.
_BLOCK = re.compile(r"^denoiser\..*\.\d+\.")
_CODER = re.compile(r"autoencoder\.(?:en|de)coder\.\d+\b")
INT8 = {"MatMul": _BLOCK, "Conv": _CODER, "Convolution": _CODER}
# The modules around a node, outermost first, then its own name; written by torch.onnx.
SCOPES = "pkg.torch.onnx.name_scopes"
PRODUCTS = ("MatMul", "Gemm", "Conv")
# These say, at every export, that torchvision is absent and that a Split was not folded.
CHATTY_LOGGERS = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer")


def write_onnx(program: "Program", path: Path) -> None:
    """Write a program as an ONNX file, its axes named as in the signature, and check it.

    Weights above 1.9 GB go to `path` + ".data".
    Raises: EngineError if an operator has no ONNX form, or onnx or onnxscript are not installed.
    """
    for package in ("onnx", "onnxscript"):
        reason = missing_package(package, install=f"{package}; only export needs it")
        if reason:
            raise EngineError(f"no ONNX file can be written: {reason}")
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


def is_large(path: Path) -> bool:
    """Say whether the weights of an ONNX file lie in a file beside it."""
    return path.with_name(path.name + DATA_SUFFIX).exists()


def annotate(
    path: Path, properties: Mapping[str, str], *, defaults: "Mapping[str, np.ndarray]"
) -> None:
    """Write properties into an ONNX file, and values for inputs that may be left out.

    properties: what ONNX Runtime calls custom metadata. defaults: by input; each with a first axis
    of 1, along which such an input may then also have as many rows as there are images.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    said = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, said | dict(properties))
    for given in model.graph.input:
        if given.name in defaults:
            value = onnx.numpy_helper.from_array(defaults[given.name], given.name)
            model.graph.initializer.append(value)
            given.type.tensor_type.shape.dim[0].dim_param = f"{given.name}_batch"
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


def _tidy(model: Any, signature: Signature) -> None:
    """Name products by their modules, and the axes that vary as the signature does.

    torch.export numbers these (s0, s1). Notes on where each node came from are left out: of a small
    model they are half of the file.
    """
    graph = model.graph
    _name_products(graph)
    for annotated in (graph, *graph):
        annotated.metadata_props.clear()
    known = {value.name: value for value in graph.inputs}
    renamed = {
        str(known[spec.name].shape[position]): axis
        for spec in signature.inputs
        for position, axis in signature.varying(spec)
        if not isinstance(known[spec.name].shape[position], int)  # fixed after all
    }
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        for position, size in enumerate(value.shape or ()):
            if str(size) in renamed:
                value.shape[position] = renamed[str(size)]


def in_int8(kind: str, name: str) -> bool:
    """Say whether a layer takes int8. kind: of its operator, in ONNX or OpenVINO."""
    return kind in INT8 and INT8[kind].search(name) is not None


def _name_products(graph: Any) -> None:
    """Give products the names of their modules, and transposed weights a name that says so.

    A module that is used again has a number after its name.
    """
    seen: Counter[str] = Counter()
    for node in graph:
        scopes = literal_eval(node.metadata_props.get(SCOPES, "[]"))
        if node.op_type not in PRODUCTS or len(scopes) < 2:
            continue
        weight = node.inputs[1]
        # A part of a module's weight is used outside of the module.
        owner, is_part, _ = weight.name.rpartition(".weight_")
        module = owner if is_part else scopes[-2]
        if not module:
            continue
        seen[module] += 1
        node.name = module if seen[module] == 1 else f"{module}/{seen[module]}"
        if weight.const_value is not None and "." not in weight.name:
            weight.name = f"{node.name}.weight.T"


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
