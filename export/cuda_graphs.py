"""CUDA graphs: a run of many kernels, recorded once and started as one.

Launching thousands of kernels from Python takes longer than some of them run; a graph of them is
launched once. It reads and writes fixed places, so inputs are copied in and outputs stay until the
next call.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
WARMUPS = 3  # on a stream of their own, so that nothing is allocated or chosen while recording


class CudaGraph:
    """A function of tensors on one GPU, recorded for inputs of one shape."""

    def __init__(self, run: Run, inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                run(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = list(run(self._inputs))

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on other values. The results are overwritten by the next call."""
        for place, given in zip(self._inputs, inputs, strict=True):
            place.copy_(given)
        self._graph.replay()
        return self._outputs


class Recorded:
    """A function of tensors that is recorded at the first call with each set of shapes."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._graphs: dict[tuple[torch.Size, ...], CudaGraph] = {}

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run, and give results that are overwritten by the next call of the same shapes."""
        key = tuple(tensor.shape for tensor in inputs)
        if key not in self._graphs:
            self._graphs[key] = CudaGraph(self._run, inputs)
        return self._graphs[key](inputs)


@torch.inference_mode()
def run_on_arrays(
    start: Run, arrays: Sequence[np.ndarray], device: str | torch.device
) -> list[np.ndarray]:
    """Run a function of tensors of a device on arrays."""
    inputs = [torch.from_numpy(array).to(device) for array in arrays]
    return [result.cpu().numpy() for result in start(inputs)]
