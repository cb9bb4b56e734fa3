"""From a program to the graph that TensorRT is given: all that needs neither TensorRT nor a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewshot_rt.errors import EngineError

from .bound import lowered
from .engine import Examples, require_examples
from .modelopt import calibrate
from .onnx_edit import infer
from .onnx_graph import write_onnx
from .onnx_trt import (
    NORMS_SINCE,
    find_sites,
    find_slots,
    read_model,
    scale_attention,
    spell_out_norms,
    write_model,
)
from .onnx_trt_checks import check_model
from .onnx_trt_int8 import FORMS, layers_to_round, quantise, read_greatest
from .trt_refit import Slot, product_weights

if TYPE_CHECKING:
    from .program import Program

# What products that are not rounded to 8 bits are in.
HALVES = {"int8": "fp16", "fp8": "bf16"}


@dataclass(frozen=True)
class Declared:
    """A graph as a file, where it has the weights that adapters may change, and its attentions."""

    path: Path
    slots: Mapping[str, Slot]
    attentions: int


def declare(
    program: "Program",
    folder: Path,
    *,
    precision: str,
    examples: Examples,
    version: tuple[int, ...],
) -> Declared:
    """Write the graph of a program into a folder, and check it.

    examples: what the role is given; for int8 and fp8. version: of TensorRT.
    In int8 and fp8 no weight can be set later: TensorRT rounds them when it builds.
    Raises: EngineError if the graph is not for TensorRT, or examples or packages are missing.
    """
    if precision in FORMS:
        require_examples("trt", precision, examples)
    half, path = HALVES.get(precision, precision), folder / "model.onnx"
    write_onnx(lowered(program, half), path)
    model = read_model(path)
    infer(model)
    slots = find_slots(model, product_weights(program))
    scale_attention(model)
    if precision in FORMS:
        greatest = _calibrate(program, folder, form=precision, examples=examples)
        quantise(model, greatest, form=precision, folder=folder)
    check_model(model, role=program.role, precision=half)
    if version < NORMS_SINCE:
        spell_out_norms(model)
    write_model(model, path)
    is_live = program.role == "denoiser" and precision not in FORMS
    return Declared(path, slots if is_live else {}, len(find_sites(model)))


def _calibrate(
    program: "Program", folder: Path, *, form: str, examples: Examples
) -> Mapping[str, float]:
    """Find how great the tokens of all layers to round become, by the weights' names in the graph.

    Raises: EngineError if there is nothing to round.
    """
    path = folder / "exact.onnx"
    write_onnx(program, path)
    model = read_model(path)
    infer(model)
    write_model(model, path)
    layers = layers_to_round(model, form)
    if not layers:
        raise EngineError(f"the {program.role} has no layers to round to {form}. Choose bf16.")
    rounded = folder / "rounded.onnx"
    calibrate(path, rounded, layers=layers, examples=examples, device=program.device)
    return read_greatest(rounded)
