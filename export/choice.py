"""Which attention a graph gets: ours where it was measured to be at least level, else torch's."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewshot_rt.kernels.declaration import HAS_TRITON
from fewshot_rt.kernels.swap import Site

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[], object]
BATCH = 2  # of the example; what varies with the batch grows for both alike
WARMUPS, ROUNDS = 3, 9


class Measured:
    """Says whether our kernel is at least level with torch's attention; asked once for each shape.

    Both take turns on tensors of the shapes and type of the place, in the type that the graph will
    have there. device: where the graph will run. On a processor our operator is torch's attention,
    so there is nothing to gain.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = torch.device(device), dtype
        self.ratios: dict[tuple[int | None, ...], float] = {}

    def __call__(self, site: Site) -> bool:
        """Compare at a place. Its time with ours over that with torch's is kept in `ratios`."""
        if self._device.type != "cuda" or not HAS_TRITON or site.is_masked:
            return False
        key = (site.heads, site.length, site.key_length, site.width)
        if key not in self.ratios:
            self.ratios[key] = self.compare(site)
        return self.ratios[key] <= 1

    @torch.no_grad()
    def compare(self, site: Site) -> float:
        """Give the median time of ours over that of torch's; infinite for lengths that vary."""
        if site.length is None or site.key_length is None:
            return float("inf")
        lengths = (site.length, site.key_length, site.key_length)
        # As projections leave them: heads side by side.
        tensors = [
            torch.randn(
                BATCH, length, site.heads, site.width, device=self._device, dtype=self._dtype
            ).transpose(1, 2)
            for length in lengths
        ]
        ours: Attend = torch.ops.fewshot_rt.attention
        return ratio_of_times(lambda: ours(*tensors), lambda: _torchs(*tensors), measure=self._time)

    def _time(self, call: Call) -> float:
        self._wait()
        started = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def ratio_of_times(ours: Call, theirs: Call, *, measure: Callable[[Call], float]) -> float:
    """Give the median over rounds of our time over theirs. measure: gives the time of a call."""
    for _ in range(WARMUPS):
        ours()
        theirs()
    ratios = [measure(ours) / measure(theirs) for _ in range(ROUNDS)]
    return sorted(ratios)[ROUNDS // 2]


def _torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value)
