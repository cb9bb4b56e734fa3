"""An ONNX file in int8: linear layers of blocks and a tiny autoencoder's, by static quantisation.

Scales are found on examples once, one for each tensor that a layer takes and one for each output
channel of a weight. (Scales found at each call would be those of a whole batch, and an answer would
depend on what came with it.) ONNX Runtime's own quantiser writes them as QuantizeLinear and
DequantizeLinear around each product. Products give fp32; convolutions give int8, as ONNX Runtime
runs them in it only then. The rest stays in fp32.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .engine import Examples
from .onnx_graph import in_int8, is_large


def quantise(path: Path, examples: Examples) -> None:
    """Put int8 into an ONNX file, in place. examples: of its inputs; at least one.

    A role without such layers stays as it is.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out the examples one by one."""

        def __init__(self) -> None:
            self._left = iter(examples)

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self._left, None)

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    layers = [n for n in graph.node if in_int8(n.op_type, n.name) and n.input[1] in weights]
    if not layers:
        return
    # In a folder of its own: files of external data are known by their names.
    with TemporaryDirectory(dir=path.parent) as folder, _quiet():
        quantize_static(
            path,
            Path(folder) / path.name,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=sorted({layer.op_type for layer in layers}),
            nodes_to_quantize=[layer.name for layer in layers],
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
            use_external_data_format=is_large(path),
        )
        for file in Path(folder).iterdir():
            file.replace(path.with_name(file.name))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the advice to simplify the graph first, which torch.onnx has done."""
    logger = logging.getLogger()
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)
