"""NVIDIA Model Optimizer: it finds how great tokens become on examples, to round them to 8 bits.

It runs the model in fp32 with ONNX Runtime over what a role is given when it answers the user's own
pairs. It is asked for int8 whatever is wanted: its scales for fp8 are those of int8 times 448/127
(`int8_to_fp8`), 12 times what the magnitudes call for, and waste the small values of e4m3.
Tried with 0.47.0 on the processor alone, where neither CUDA nor TensorRT is there.
Source: https://nvidia.github.io/Model-Optimizer, `modelopt.onnx.quantization.quantize`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fewshot_rt.errors import EngineError

from .engine import Examples, missing_package
from .onnx_graph import is_large

INSTALL = "nvidia-modelopt[onnx]; only export in int8 and fp8 needs it"


def calibrate(
    model: Path,
    rounded: Path,
    *,
    layers: Sequence[str],
    examples: Examples,
    device: str,
) -> None:
    """Write an ONNX model in fp32 once more, the products of some nodes rounded to int8.

    layers: the nodes by name. examples: of the model's inputs, all of one size. device: where to
    run it.
    Raises: EngineError if Model Optimizer is not installed.
    """
    reason = missing_package("modelopt", install=INSTALL)
    if reason:
        raise EngineError(f"scales for 8 bits cannot be found: {reason}")
    from modelopt.onnx.quantization import quantize

    quantize(
        str(model),
        quantize_mode="int8",
        # Examples one after the other on the first axis; it cuts them by the model's own sizes.
        calibration_data={
            name: np.concatenate([example[name] for example in examples]) for name in examples[0]
        },
        calibration_method="max",
        calibration_eps=["cpu"] if device == "cpu" else ["cuda:0", "cpu"],
        nodes_to_quantize=list(layers),
        use_external_data_format=is_large(model),
        output_path=str(rounded),
        high_precision_dtype="fp32",
        log_level="ERROR",
    )
