"""A TensorRT engine at work: on torch's tensors, in torch's memory, on torch's streams.

Nothing is copied on the way in or out. TensorRT holds no memory for what it computes: a call
borrows it from PyTorch, as it does for its answers, and engines that run one after another have the
same. (A call that is recorded as a CUDA graph keeps its own.)
Source: the bindings' docstrings, 10.14 and 11.4.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.spec import Signature

from .cuda_graphs import Recorded, run_on_arrays
from .engine import AGAIN, make_runner, require_same
from .trt_network import make_log, version_here
from .trt_refit import Fill, RefitWeights

if TYPE_CHECKING:
    import tensorrt as trt


def facts_here(device: str) -> dict[str, str]:
    """Say what an engine depends on: the version of TensorRT, and the GPU.

    Neither plans nor their kernels are for another version or another model of GPU, unless they
    were built to be (and slower). TensorRT's own check is not in the bindings, so it is made here.
    """
    where = torch.device(device)
    return {
        "TensorRT": ".".join(map(str, version_here())),
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability(where))),
        "GPU": torch.cuda.get_device_name(where),
    }


def require_facts(facts: Mapping[str, str], *, device: str) -> None:
    """Require that an engine was built for what is here.

    Raises: EngineError that says what differs, and what to do.
    """
    require_same(facts, facts_here(device), made="engine was built")


def open_engine(path: Path, *, device: str) -> "trt.ICudaEngine":
    """Open the file of a plan. Raises: ModelError if it is damaged."""
    try:
        return open_plan(path.read_bytes(), device=device)
    except (OSError, ModelError) as error:
        raise ModelError(f"{path} is damaged ({error}). {AGAIN}") from error


def open_plan(plan: bytes, *, device: str) -> "trt.ICudaEngine":
    """Open a plan. Raises: ModelError if it is damaged."""
    import tensorrt as trt

    log = make_log()
    with torch.cuda.device(torch.device(device)):
        engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise ModelError(" ".join(log.errors) or "TensorRT gives no reason")
    return engine


class EngineRunner:
    """Runs an engine; what is launched for a call is recorded once and started as one.

    live: its weights, if adapters change them.
    """

    def __init__(self, engine: "trt.ICudaEngine", signature: Signature, *, device: str) -> None:
        import tensorrt as trt

        self.live: RefitWeights | None = None
        self.engine, self._signature, self._device = engine, signature, torch.device(device)
        self._context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self._recorded = Recorded(self.run)  # anew after weights are
        self._runner = make_runner(
            signature, lambda arrays: run_on_arrays(self._recorded, arrays, self._device)
        )

    def __call__(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Take and give arrays by name, as the signature has them."""
        return self._runner(tensors)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on dense tensors of the device, on the current stream, without copies.

        Shapes: as the signature says. Raises: EngineError if TensorRT cannot start.
        """
        context = self._context
        for spec, tensor in zip(self._signature.inputs, inputs, strict=True):
            context.set_input_shape(spec.name, tuple(tensor.shape))
            context.set_tensor_address(spec.name, tensor.data_ptr())
        results = []
        for spec in self._signature.outputs:
            sizes = context.get_tensor_shape(spec.name)
            result = torch.empty(
                [sizes[i] for i in range(len(sizes))],
                dtype=getattr(torch, spec.dtype),
                device=self._device,
            )
            context.set_tensor_address(spec.name, result.data_ptr())
            results.append(result)
        size = self.engine.device_memory_size_v2
        # Given back to PyTorch when this returns: what comes next on the stream comes after.
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        context.set_device_memory(memory.data_ptr(), size)
        if not context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise EngineError("TensorRT could not start a call. Is the GPU's memory full?")
        return results

    def push(self, names: Iterable[str], fill: Fill) -> None:
        """Set weights, by their names in the engine, and such as it needs with them.

        Raises: EngineError if the engine does not take one.
        """
        import tensorrt as trt

        types = {
            torch.float32: trt.DataType.FLOAT,
            torch.float16: trt.DataType.HALF,
            torch.bfloat16: trt.DataType.BF16,
        }
        torch.cuda.synchronize(self._device)  # nothing may be under way
        log = make_log()
        refitter = trt.Refitter(self.engine, log)
        kept: dict[str, Tensor] = {}
        pending = list(names)
        while pending:
            for name in pending:
                kept[name] = tensor = fill(name)
                given = trt.Weights(types[tensor.dtype], tensor.data_ptr(), tensor.numel())
                if not refitter.set_named_weights(name, given):
                    raise EngineError(f"the engine does not take {name}: {' '.join(log.errors)}")
            pending = [name for name in refitter.get_missing_weights() if name not in kept]
        if not refitter.refit_cuda_engine():
            raise EngineError(f"the engine's weights were not set: {' '.join(log.errors)}")
        # What was recorded may have had weights elsewhere.
        self._recorded = Recorded(self.run)
