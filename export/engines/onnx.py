"""ONNX Runtime: a program as an ONNX file, run without PyTorch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.export.engine import AGAIN, Examples, make_runner, missing_package, require_examples
from fewshot_rt.predictor import Runner
from fewshot_rt.spec import Signature

if TYPE_CHECKING:
    from fewshot_rt.export.program import Program

name = "onnx"
precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8")
suffix = ".onnx"
is_live = False
merged: tuple[str, ...] = ()
is_fixed = False
# Its kernels for processors know neither bf16 nor fp16.
coders = {"int8": "fp32"}
tiny: tuple[str, ...] = ("int8",)
calibrated: tuple[str, ...] = ("int8",)
hints: tuple[str, ...] = ()

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
HALVES = ("fp16", "bf16")


def missing() -> str | None:
    """Say why it cannot run here and what to install; None if it can."""
    return missing_package("onnxruntime", install="onnxruntime, or onnxruntime-gpu")


def devices() -> tuple[str, ...]:
    """List the kinds of device that it can run on here."""
    import onnxruntime

    present = onnxruntime.get_available_providers()
    return tuple(kind for kind, provider in PROVIDERS.items() if provider in present)


def build(program: "Program", path: Path, *, precision: str, examples: Examples = ()) -> None:
    """Write a program as an ONNX file, its axes named as in the signature, and check it.

    Weights above 1.9 GB go to `path` + ".data". examples: what int8 finds its scales on.
    Raises: EngineError if an operator has no ONNX form, onnx or onnxscript are not installed, the
    precision is not for the program's device, or examples are missing.
    """
    from fewshot_rt.export.bound import lowered
    from fewshot_rt.export.onnx_graph import write_onnx
    from fewshot_rt.export.onnx_int8 import quantise

    if precision in HALVES and program.device == "cpu":
        raise EngineError(
            f"engine 'onnx' has {precision} on GPUs alone (--device cuda). On a processor choose "
            "int8 or fp32, or another engine."
        )
    if precision != "int8":
        write_onnx(lowered(program, precision), path)
        return
    if program.device != "cpu":
        raise EngineError("engine 'onnx' has int8 on processors alone. On a GPU choose bf16.")
    require_examples(name, precision, examples)
    write_onnx(program, path)
    quantise(path, examples)


def load(
    path: Path, signature: Signature, *, device: str = "cpu", threads: int | None = None
) -> Runner:
    """Open an ONNX file on one device; operators never move to another one quietly.

    On a GPU, inputs and outputs stay where they are from call to call, and what is launched for a
    call is recorded once and started as one (a CUDA graph), for each batch size.

    Raises: EngineError if the device is not there, ModelError if the file is damaged.
    """
    import onnxruntime

    session_type, errors = onnxruntime.InferenceSession, _load_errors()
    try:
        session = session_type(str(path), _options(threads), providers=_providers(device))
    except errors as error:
        raise ModelError(f"{path} is damaged ({error}). {AGAIN}") from error
    names = [spec.name for spec in signature.inputs]
    outputs = [spec.name for spec in signature.outputs]
    if device != "cpu":
        return make_runner(signature, Bound(session, signature, device=device))

    def run(tensors: list[np.ndarray]) -> list[np.ndarray]:
        results: list[np.ndarray] = session.run(outputs, dict(zip(names, tensors, strict=True)))
        return results

    return make_runner(signature, run)


class Bound:
    """Runs a session on tensors of its device, which are kept for each batch size.

    On a GPU the first call with a batch size records a CUDA graph, which needs the addresses of
    inputs and outputs to stay.
    """

    def __init__(self, session: Any, signature: Signature, *, device: str) -> None:
        self._session, self._signature = session, signature
        self._kind, _, index = device.partition(":")
        self._index = int(index or 0)
        self._places: dict[tuple[tuple[int, ...], ...], tuple[Any, list[Any], list[Any], Any]] = {}

    def __call__(self, tensors: list[np.ndarray]) -> list[np.ndarray]:
        """Take and give arrays in the order of the signature."""
        key = tuple(tensor.shape for tensor in tensors)
        if key not in self._places:
            self._places[key] = self._bind(tensors, number=len(self._places))
        binding, inputs, outputs, options = self._places[key]
        for place, tensor in zip(inputs, tensors, strict=True):
            place.update_inplace(np.ascontiguousarray(tensor))
        self._session.run_with_iobinding(binding, options)
        return [np.array(place.numpy()) for place in outputs]

    def _bind(
        self, tensors: list[np.ndarray], *, number: int
    ) -> tuple[Any, list[Any], list[Any], Any]:
        """Make places for tensors of these sizes on the device. number: of its CUDA graph."""
        import onnxruntime

        make, where = onnxruntime.OrtValue, (self._kind, self._index)
        specs = self._signature.inputs
        sizes = {
            axis: size
            for spec, tensor in zip(specs, tensors, strict=True)
            for axis, size in zip(spec.axes, tensor.shape, strict=True)
            if isinstance(axis, str)
        }
        # Not from the arrays themselves, whose memory would be shared on a processor.
        inputs, outputs = (
            [
                make.ortvalue_from_shape_and_type(
                    list(self._signature.shape(spec, **sizes)), np.dtype(spec.dtype), *where
                )
                for spec in side
            ]
            for side in (specs, self._signature.outputs)
        )
        binding = self._session.io_binding()
        for spec, place in zip(specs, inputs, strict=True):
            binding.bind_ortvalue_input(spec.name, place)
        for spec, place in zip(self._signature.outputs, outputs, strict=True):
            binding.bind_ortvalue_output(spec.name, place)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number + 1))
        return binding, inputs, outputs, options


def _options(threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors; they are raised as well
    # The three roles are three sessions: threads of one that go on spinning would hold up the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
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
    if kind == "cpu":
        return [provider]
    return [(provider, {"device_id": index or "0", "enable_cuda_graph": "1"})]


def _load_errors() -> tuple[type[Exception], ...]:
    """Give what ONNX Runtime raises for a file that it cannot read; these share no parent."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidProtobuf", "InvalidGraph", "NoSuchFile", "NoModel")
    return tuple(getattr(state, name) for name in names)
