"""An ONNX graph as a TensorRT engine: what the network and the builder are told, and nothing else.

Networks are strongly typed: precision is in the graph, no flag sets it. (TensorRT 11 knows nothing
else and ignores the flag for it, 10 needs it.) Sizes are fixed where the signature fixes them; if
an axis varies there is one optimisation profile for it, as refittable engines may have no more.
Weights that adapters change are marked one by one (REFIT_INDIVIDUAL; plain REFIT may lose the bias
of a GEMM in 11.3, and REFIT_IDENTICAL is for the same weights alone) and left out of the plan
(STRIP_PLAN), since they lie beside it anyway.
Source: the bindings' docstrings, 10.14 and 11.4; NvInfer.h 11.1; release notes of 11.3.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewshot_rt.errors import EngineError
from fewshot_rt.files import whole
from fewshot_rt.spec import Signature, TensorSpec

if TYPE_CHECKING:
    import tensorrt as trt


def version_here() -> tuple[int, ...]:
    """Give the version of TensorRT that is installed, as numbers."""
    import tensorrt as trt

    return tuple(int(part) for part in trt.__version__.split(".")[:4] if part.isdigit())


def make_log() -> Any:
    """Give a logger that keeps the errors that TensorRT reports, in `errors`, for messages."""
    import tensorrt as trt

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
        """Keeps errors; TensorRT says much else that is no one's business."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            """Take what TensorRT reports."""
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return Log()


def build_plan(
    path: Path,
    signature: Signature,
    *,
    role: str,
    refittable: Sequence[str],
    attentions: int,
    cache: Path,
) -> bytes:
    """Build an engine of an ONNX file for the GPU at hand; give its plan.

    refittable: the weights, by their names in the file, to leave out of it and to be set later.
    attentions: how many the graph has that must still be whole in the network. cache: the file of
    timings of kernels; it is read if it is there, and kept.
    Raises: EngineError with TensorRT's own words if it refuses the graph, or finds no kernel: for
    an attention that cannot be fused, for one.
    """
    import tensorrt as trt

    log = make_log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        found = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise EngineError(f"TensorRT cannot read the {role}: {_said(found)}")
    require_attention(network, attentions, role=role)
    config = builder.create_builder_config()
    # In fp32 products are in fp32; in other precisions none is left in it.
    config.clear_flag(trt.BuilderFlag.TF32)
    add_profile(builder, config, signature)
    mark_refittable(network, config, refittable)
    known = cache.read_bytes() if cache.exists() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan: Any = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT cannot build the {role}: {_said(log.errors)}")
    with whole(cache) as temporary:
        temporary.write_bytes(config.get_timing_cache().serialize())
    return bytes(plan)


def require_attention(network: "trt.INetworkDefinition", expected: int, *, role: str) -> None:
    """Require that the parser made every attention one. Raises: EngineError."""
    import tensorrt as trt

    layers = (network.get_layer(index) for index in range(network.num_layers))
    found = sum(layer.type == trt.LayerType.ATTENTION_INPUT for layer in layers)
    if found != expected:
        raise EngineError(f"TensorRT made {found} attentions of the {expected} of the {role}.")


def add_profile(builder: "trt.Builder", config: "trt.IBuilderConfig", signature: Signature) -> None:
    """Say within which sizes the inputs vary, if they do."""
    import tensorrt as trt

    ranges = {spec.name: _bounds(signature, spec) for spec in signature.inputs}
    ranges = {name: of for name, of in ranges.items() if of[0] != of[2]}
    if not ranges:
        return
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in ranges.items():
        profile.set_shape(name, trt.Dims(least), trt.Dims(usual), trt.Dims(most))
    config.add_optimization_profile(profile)


def mark_refittable(
    network: "trt.INetworkDefinition", config: "trt.IBuilderConfig", names: Sequence[str]
) -> None:
    """Leave weights out of the plan, to be set later. Raises: EngineError if there is no such."""
    import tensorrt as trt

    if not names:
        return
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    for name in names:
        if not network.mark_weights_refittable(name):
            raise EngineError(f"TensorRT knows no weight {name!r} that can be set later.")


def _bounds(signature: Signature, spec: TensorSpec) -> list[list[int]]:
    """Give the least, usual and greatest shape of a tensor."""
    sizes = [{axis: bounds[i] for axis, bounds in signature.sizes.items()} for i in range(3)]
    return [list(signature.shape(spec, **of)) for of in sizes]


def _said(messages: Sequence[str]) -> str:
    return " ".join(" ".join(messages[:3]).split()) or "it gives no reason."
