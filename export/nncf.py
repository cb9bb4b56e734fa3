"""An OpenVINO model in int8: linear layers of a transformer's blocks, and a tiny autoencoder's.

Scales are found on examples once. Of NNCF's corrections, the one that moves ranges from tokens to
weights makes the error smaller (SmoothQuant), and the one of biases adds to it, so it is left out.
"""

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from fewshot_rt.errors import EngineError

from .engine import Examples, missing_package
from .engines.openvino import without_telemetry
from .onnx_graph import in_int8

WITHOUT_ARITHMETIC = ("Constant", "Parameter", "Result")


def quantise(model: Any, examples: Examples) -> Any:
    """Give a model whose layers are in int8 where `in_int8` says so; without any, as it is.

    Raises: EngineError if NNCF is not installed.
    """
    reason = missing_package("nncf", install="fewshot-rt[openvino]; only export needs it")
    if reason:
        raise EngineError(f"engine 'openvino' cannot build int8: {reason}")
    kinds = {node.get_friendly_name(): node.get_type_name() for node in model.get_ops()}
    layers = {name for name, kind in kinds.items() if in_int8(kind, name)}
    if not layers:
        return model
    has_tokens = any(kinds[name] == "MatMul" for name in layers)
    kept = layers | {name for name, kind in kinds.items() if kind in WITHOUT_ARITHMETIC}
    with without_telemetry():
        import nncf
    with redirect_stdout(StringIO()):  # it draws bars
        return nncf.quantize(
            model,
            nncf.Dataset([dict(example) for example in examples]),
            subset_size=len(examples),
            model_type=nncf.ModelType.TRANSFORMER if has_tokens else None,
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(names=sorted(set(kinds) - kept)),
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
