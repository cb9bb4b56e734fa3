"""OpenVINO: a program for processors, run without PyTorch.

It is read from the program's ONNX graph. A file says what its arithmetic is, and OpenVINO is told
to keep to it; by itself it would take bf16 wherever a processor has it:

    fp32   as captured
    bf16   a denoiser's products in bf16, as the graph has them; the other roles wholly in bf16
    int8   linear layers of a denoiser's blocks in int8, its other products in bf16, as the graph
           has them; a tiny autoencoder's layers in int8, the rest of it in bf16

The network is compiled for each batch size that it is called with, which is faster than for any.
For the one to be expected it begins when a file is opened, so that roles are compiled side by side.
With the hint "latency" all cores take one call together. With "throughput" the images of a call are
answered side by side, each by a part of the cores, which many cores use better.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.export.engine import AGAIN, Examples, make_runner, missing_package, require_examples
from fewshot_rt.predictor import Runner
from fewshot_rt.spec import Signature

if TYPE_CHECKING:
    from fewshot_rt.export.program import Program

name = "openvino"
precisions: tuple[str, ...] = ("fp32", "bf16", "int8")
suffix = ".xml"
is_live = False
merged: tuple[str, ...] = ()
is_fixed = False
coders = {"int8": "bf16"}
tiny: tuple[str, ...] = ("int8",)
calibrated: tuple[str, ...] = ("int8",)
hints: tuple[str, ...] = ("latency", "throughput")

# What a denoiser's graph is lowered to; times and tables stay in fp32.
PRODUCTS = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16 around blocks"}
Shapes = tuple[tuple[int, ...], ...]
SAID = "fewshot-rt"  # where a file says what its arithmetic is
CAPABILITIES = {"bf16": {"BF16"}, "int8": {"INT8", "BF16"}}
TELEMETRY = "openvino_telemetry"


def missing() -> str | None:
    """Say why it cannot run here and what to install; None if it can."""
    return missing_package("openvino", install="fewshot-rt[openvino]")


def devices() -> tuple[str, ...]:
    """List the kinds of device that it can run on here."""
    with without_telemetry():
        import openvino

    present = openvino.Core().available_devices
    return tuple(dict.fromkeys(device.partition(".")[0].lower() for device in present))


def build(program: "Program", path: Path, *, precision: str, examples: Examples = ()) -> None:
    """Write a program as OpenVINO's two files: the graph, and its weights in `.bin` beside it.

    examples: what int8 finds its scales on.
    Raises: EngineError if an operator has no form in ONNX or OpenVINO, a package is missing, the
    processor has no arithmetic of the precision, or examples are missing.
    """
    with without_telemetry():
        import openvino

    from fewshot_rt.export.bound import lowered
    from fewshot_rt.export.onnx_graph import write_onnx
    from fewshot_rt.export.rotary import part_halves

    core = openvino.Core()
    if program.device != "cpu":
        raise EngineError("engine 'openvino' is for processors. On a GPU choose trt, aoti or onnx.")
    _require_arithmetic(core, precision, "CPU")
    if precision == "int8":
        require_examples(name, precision, examples)
    is_denoiser = program.role == "denoiser"
    with TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / "program.onnx"
        if is_denoiser:
            program = lowered(program, PRODUCTS[precision], change=part_halves)
        write_onnx(program, file)
        try:
            model = core.read_model(file)
        except RuntimeError as error:
            raise EngineError(f"the {program.role} has no form in OpenVINO: {error}") from error
        if precision == "int8":
            from fewshot_rt.export.nncf import quantise

            model = quantise(model, examples)
        model.set_rt_info(precision, [SAID, "precision"])
        is_half = precision != "fp32" and not is_denoiser
        model.set_rt_info("bf16" if is_half else "f32", [SAID, "rest"])
        openvino.save_model(model, path, compress_to_fp16=False)


def load(
    path: Path,
    signature: Signature,
    *,
    device: str = "cpu",
    threads: int | None = None,
    hint: str = "latency",
) -> Runner:
    """Open the two files on one device. hint: one of `hints`.

    Raises: EngineError if the device is not there, or has no arithmetic of the file's precision;
    ModelError if a file is damaged.
    """
    with without_telemetry():
        import openvino

    core = openvino.Core()
    if device.lower() not in devices():
        raise EngineError(
            f"engine 'openvino' has no device {device!r} here: there is {', '.join(devices())}."
        )
    place = device.upper()
    try:
        model = core.read_model(path)
        said = {key: str(model.get_rt_info([SAID, key]).value) for key in ("precision", "rest")}
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(f"{path} is damaged ({reason}). {AGAIN}") from error
    _require_arithmetic(core, said["precision"], place)
    way: dict[str, Any] = {
        "PERFORMANCE_HINT": hint.upper(),
        "INFERENCE_PRECISION_HINT": said["rest"],
    }
    if place == "CPU":  # cores are not kept, which another process may want
        way["ENABLE_CPU_PINNING"] = False
        way |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    # Most calls are full; programs for one image are captured for two.
    kind, batch = Compiled, signature.most if signature.most > 2 else 1
    if hint == "throughput":
        kind, batch = SideBySide, 1
        way["PERFORMANCE_HINT_NUM_REQUESTS"] = signature.most
    return make_runner(signature, kind(core, model, signature, way=way, place=place, batch=batch))


class Compiled:
    """Runs a model, which is compiled once for each batch size.

    way: what OpenVINO is told. batch: the size that is to be expected; for it this begins at once.
    """

    def __init__(
        self,
        core: Any,
        model: Any,
        signature: Signature,
        *,
        way: dict[str, Any],
        place: str,
        batch: int,
    ) -> None:
        self._core, self._model, self._way, self._place = core, model, way, place
        self._names = [spec.name for spec in signature.inputs]
        self._outputs = [spec.name for spec in signature.outputs]
        self.varies = [isinstance(spec.axes[0], str) for spec in signature.inputs]
        self.requests: dict[Shapes, Any] = {}
        sizes = dict.fromkeys(signature.sizes, batch)
        shapes = tuple(signature.shape(spec, **sizes) for spec in signature.inputs)
        pool = ThreadPoolExecutor(max_workers=1)
        self._begun: dict[Shapes, Future[Any]] = {shapes: pool.submit(self._compile, shapes)}
        pool.shutdown(wait=False)

    def __call__(self, tensors: list[np.ndarray]) -> list[np.ndarray]:
        """Take and give arrays in the order of the signature."""
        key = tuple(tensor.shape for tensor in tensors)
        if key not in self.requests:
            self.requests[key] = self._compiled(key).create_infer_request()
        request = self.requests[key]
        request.infer(self._named(tensors))
        return self._copies(request)

    def _compiled(self, shapes: Shapes) -> Any:
        begun = self._begun.pop(shapes, None)
        return self._compile(shapes) if begun is None else begun.result()

    def _compile(self, shapes: Shapes) -> Any:
        model = self._model.clone()
        model.reshape(dict(zip(self._names, map(list, shapes), strict=True)))
        return self._core.compile_model(model, self._place, self._way)

    def _named(self, tensors: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._names, map(np.ascontiguousarray, tensors), strict=True))

    def _copies(self, request: Any) -> list[np.ndarray]:
        """Take what came out; the next call writes into the same memory."""
        return [np.array(request.get_tensor(output).data) for output in self._outputs]


class SideBySide(Compiled):
    """Runs the images of a call as calls of one each, as many at once as OpenVINO finds best.

    That is at most a full batch, which OpenVINO is told.
    """

    def __call__(self, tensors: list[np.ndarray]) -> list[np.ndarray]:
        """Take and give arrays in the order of the signature."""
        counts = [len(t) for t, varies in zip(tensors, self.varies, strict=True) if varies]
        rows = [
            [
                tensor[row : row + 1] if varies else tensor
                for tensor, varies in zip(tensors, self.varies, strict=True)
            ]
            for row in range(max(counts))
        ]
        key = tuple(tensor.shape for tensor in rows[0])
        if key not in self.requests:
            import openvino  # it is there already: a model is

            self.requests[key] = openvino.AsyncInferQueue(self._compiled(key))
        queue = self.requests[key]
        found: list[list[np.ndarray]] = [[] for _ in rows]
        queue.set_callback(lambda request, row: found[row].extend(self._copies(request)))
        for row, given in enumerate(rows):
            queue.start_async(self._named(given), row)
        queue.wait_all()
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Import as if OpenVINO's telemetry were not installed: nothing is sent, or kept at home."""
    if TELEMETRY in sys.modules:
        yield
        return
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]


def _require_arithmetic(core: Any, precision: str, device: str) -> None:
    """Require arithmetic of a precision. Raises: EngineError that says what to choose instead."""
    needed = CAPABILITIES.get(precision, set())
    if not needed <= set(core.get_property(device, "OPTIMIZATION_CAPABILITIES")):
        raise EngineError(
            f"this {device.lower()} has no arithmetic in {' and '.join(sorted(needed)).lower()}. "
            "Choose fp32, or another engine."
        )
