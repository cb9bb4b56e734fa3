"""Whose attention an engine gets: our kernel where it was measured to be faster, else TensorRT's.

Axes: B batch, N heads, L tokens, D head width.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewshot_rt.kernels.declaration import HAS_TRITON
from fewshot_rt.spec import Signature, TensorSpec

from .choice import Call, ratio_of_times
from .onnx_trt import Site, put_plugin, write_model, write_one_attention
from .trt_network import build_plan
from .trt_plugin import architecture_here, register
from .trt_runtime import EngineRunner, open_plan

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
CALLS = 20  # that are timed together


class Measured:
    """Says whether our kernel is faster than TensorRT's attention; asked once for each kind.

    Both take turns, as engines of one attention between the transpositions that split and merge
    heads. cache: see `build_plan`. ratios: by kind, the time with ours over that with TensorRT's.
    """

    def __init__(self, device: str, *, cache: Path) -> None:
        self._device, self._cache = device, cache
        self.ratios: dict[tuple[object, ...], float] = {}

    def __call__(self, site: Site) -> bool:
        """Compare at a place; where ours has no launch, TensorRT's stays."""
        if not can_be_ours(site):
            return False
        if site.kind not in self.ratios:
            self.ratios[site.kind] = self.compare(site)
        return self.ratios[site.kind] < 1

    def compare(self, site: Site) -> float:
        """Give the median time of ours over that of TensorRT's."""
        register()
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = (
                self._build(site, Path(folder), is_ours=is_ours) for is_ours in (False, True)
            )
        inputs = [torch.randn(shape, device=self._device).to(site.type) for shape in site.shapes]
        return ratio_of_times(lambda: ours(inputs), lambda: theirs(inputs), measure=_time_ms)

    def _build(self, site: Site, folder: Path, *, is_ours: bool) -> Run:
        """Build an engine of one attention."""
        path = folder / f"{is_ours}.onnx"
        model = write_one_attention(site)
        if is_ours:
            put_plugin(model, lambda _: True)
        write_model(model, path)
        dtype = str(site.type).removeprefix("torch.")
        names = ("query", "key", "value", "answer")
        shapes = (*site.shapes, site.shapes[0])
        specs = [TensorSpec(n, dtype, shape) for n, shape in zip(names, shapes, strict=True)]
        signature = Signature(inputs=tuple(specs[:3]), outputs=tuple(specs[3:]))
        plan = build_plan(
            path,
            signature,
            role="attention",
            refittable=(),
            attentions=int(not is_ours),
            cache=self._cache,
        )
        return EngineRunner(
            open_plan(plan, device=self._device), signature, device=self._device
        ).run


def can_be_ours(site: Site) -> bool:
    """Say whether our kernel has a launch for an attention on the GPU at hand."""
    if not HAS_TRITON or site.is_masked or site.type is torch.float32:
        return False
    from fewshot_rt.kernels.ptx_triton import modest_launch

    try:
        return modest_launch(architecture_here(), site.query[3]) is not None
    except ValueError:
        return False


def _time_ms(call: Call) -> float:
    """Time a few calls in a row."""
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
