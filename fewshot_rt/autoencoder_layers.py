"""Layers of the tiny video autoencoder, and two ways through them.

`run_all` takes all frames of a video through a layer at once, as training wants it. `run_needed`
goes frame by frame and computes only what one frame depends on: of frames that are alike, one; of
the half of a memory that is zero, nothing.

Axes: B batch, T frames, C channels, H W pixels or cells; N = B x frames.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Memory(nn.Module):
    """A residual block that also sees the frame before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(2 * channels, channels),
            nn.ReLU(),
            conv(channels, channels),
            nn.ReLU(),
            conv(channels, channels),
        )

    def forward(self, frames: Tensor, before: Tensor | None = None) -> Tensor:
        """Look at frames and at those before them; where there is none, it counts as zeros.

        Shapes: frames, before, result [N, C, h, w].
        """
        first, *rest = self.conv
        assert isinstance(first, nn.Conv2d)
        if before is None:
            weight = first.weight[:, : frames.shape[1]]
            inner = functional.conv2d(frames, weight, first.bias, padding=1)
        else:
            inner = first(torch.cat([frames, before], 1))
        for layer in rest:
            inner = layer(inner)
        return functional.relu(inner + frames)


class TimePool(nn.Module):
    """Merge each run of `stride` frames into one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Shapes: [N, C, h, w] -> [N / stride, C, h, w]."""
        n, c, h, w = frames.shape
        merged: Tensor = self.conv(frames.reshape(n // self.stride, c * self.stride, h, w))
        return merged

    def merge(self, frames: Sequence[Tensor]) -> Tensor:
        """Merge one run of frames. Shapes: each [B, C, h, w], result too."""
        if any(frame is not frames[0] for frame in frames):
            merged: Tensor = self.conv(torch.cat(list(frames), 1))
            return merged
        return functional.conv2d(frames[0], sum_alike(self.conv.weight, self.stride))


class TimeGrow(nn.Module):
    """Split each frame into `stride` frames."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Shapes: [N, C, h, w] -> [N x stride, C, h, w]."""
        n, c, h, w = frames.shape
        split: Tensor = self.conv(frames).reshape(n * self.stride, c, h, w)
        return split

    def part(self, frame: Tensor, place: int, after: nn.Conv2d) -> Tensor:
        """Give one of the frames that a frame is split into, and what a convolution makes of it.

        Both are linear, so they are one convolution. after: of 3 x 3, which keeps the size.
        Shapes: [B, C, h, w] -> [B, C', h, w].
        """
        part = self.conv.weight.chunk(self.stride)[place].flatten(1)
        weight = torch.einsum("ocyx, ci -> oiyx", after.weight, part)
        return functional.conv2d(frame, weight.contiguous(), after.bias, padding=1)


class SoftClamp(nn.Module):
    """Keep latents within -3 and 3, smoothly."""

    def forward(self, latents: Tensor) -> Tensor:
        """Shapes: any."""
        return torch.tanh(latents / 3) * 3


def sum_alike(weight: Tensor, count: int) -> Tensor:
    """Give the weight for one frame in place of as many that are alike.

    Shapes: [C', count x C, h, w] -> [C', C, h, w].
    """
    return torch.unflatten(weight, 1, (count, -1)).sum(dim=1)


def conv(channels_in: int, channels_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """Make a convolution of 3 x 3 that keeps the size, or divides it by a stride."""
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=bias)


def run_all(layers: nn.Sequential, frames: Tensor) -> Tensor:
    """Run each layer over all frames at once. Shapes: [B, T, C, H, W] -> [B, T', C', H', W']."""
    for layer in layers:
        batch, count = frames.shape[:2]
        if isinstance(layer, Memory):
            before = functional.pad(frames, (0, 0, 0, 0, 0, 0, 1, 0))[:, :count]
            flat = layer(frames.flatten(0, 1), before.flatten(0, 1))
        else:
            flat = layer(frames.flatten(0, 1))
        frames = flat.unflatten(0, (batch, -1))
    return frames


def run_needed(layers: nn.Sequential, frames: Sequence[Tensor]) -> Tensor:
    """Give the last frame that comes out of layers, computing what it depends on alone.

    Of frames that are one tensor, one is computed. Shapes: each [B, C, H, W] -> [B, C', H', W'].
    """
    steps, count = _steps(layers), len(frames)
    for step in steps:
        count = _count(step.layer, count)
    wanted, plan = [count - 1], []
    for step in reversed(steps):
        plan.append((step, wanted))
        wanted = sorted({source for t in wanted for source in _sources(step.layer, t)})
    known = {t: frames[t] for t in wanted}
    for step, wanted in reversed(plan):
        known = _run_one(step, known, wanted)
    (last,) = known.values()
    return last


class _Step(NamedTuple):
    """A layer, and the convolution behind it if it splits frames: both go together."""

    layer: nn.Module
    after: nn.Conv2d | None = None


def _steps(layers: nn.Sequential) -> list[_Step]:
    steps: list[_Step] = []
    for layer in layers:
        before, after = steps[-1] if steps else (None, None)
        if isinstance(before, TimeGrow) and after is None and isinstance(layer, nn.Conv2d):
            steps[-1] = _Step(before, layer)
        else:
            steps.append(_Step(layer))
    return steps


def _count(layer: nn.Module, count: int) -> int:
    """Say how many frames a layer makes of so many."""
    if isinstance(layer, TimePool):
        return count // layer.stride
    return count * layer.stride if isinstance(layer, TimeGrow) else count


def _sources(layer: nn.Module, t: int) -> list[int]:
    """Say which frames a layer makes its frame t of."""
    if isinstance(layer, Memory):
        return [t, t - 1] if t else [t]
    if isinstance(layer, TimePool):
        return [t * layer.stride + place for place in range(layer.stride)]
    return [t // layer.stride] if isinstance(layer, TimeGrow) else [t]


def _run_one(step: _Step, known: Mapping[int, Tensor], wanted: list[int]) -> dict[int, Tensor]:
    """Give some frames of a step, each of those that are alike computed once."""
    found: dict[int, Tensor] = {}
    made: dict[tuple[int, ...], Tensor] = {}
    for t in wanted:
        sources = [known[source] for source in _sources(step.layer, t)]
        place = t % step.layer.stride if isinstance(step.layer, TimeGrow) else 0
        key = (place, *map(id, sources))
        if key not in made:
            made[key] = _make(step, sources, place)
        found[t] = made[key]
    return found


def _make(step: _Step, sources: list[Tensor], place: int) -> Tensor:
    if isinstance(step.layer, TimePool):
        return step.layer.merge(sources)
    if isinstance(step.layer, TimeGrow):
        assert step.after is not None  # in all tiny autoencoders
        return step.layer.part(sources[0], place, step.after)
    made: Tensor = step.layer(*sources)
    return made
