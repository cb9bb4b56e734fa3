"""TAEHV's published layers, run frame by frame from weights by name, and files of random weights.

Names, shapes and order are those of github.com/madebyollin/taehv (taehv.py at 1f14a56).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from fewshot_rt.spec import Geometry
from fewshot_rt.taehv import Taehv, TinyFile, read_taehv

Steps = list[tuple[str, int, int]]
WIDTHS = ((64, 64, 64, 64), (256, 128, 64, 64))  # of the encoder and of the decoder, in their order
NARROW = ((4, 6, 4, 8), (8, 6, 4, 6))
# Channels, patch, and the times that the encoder's levels merge.
PUBLISHED: dict[str, tuple[int, int, tuple[int, int, int]]] = {
    "taew2_1": (16, 1, (2, 2, 1)),
    "taecvx": (16, 1, (2, 2, 1)),
    "taew2_2": (48, 2, (2, 2, 1)),
    "taeltx_2": (128, 4, (2, 2, 2)),
}
KINDS = {
    "wan 2.1": (3, 1, (2, 2, 1)),
    "wan 2.2": (4, 2, (2, 2, 1)),
    "ltx 2": (5, 4, (2, 2, 2)),
}


def shapes(
    channels: int, patch: int, times: tuple[int, int, int], widths: Any = WIDTHS
) -> dict[str, tuple[int, ...]]:
    """List what a file holds."""
    (first, *down), up = widths
    found: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, inside: int, outside: int, *, has_bias: bool = True) -> None:
        found[f"{name}.weight"] = (outside, inside, 3, 3)
        if has_bias:
            found[f"{name}.bias"] = (outside,)

    def memory(name: str, width: int) -> None:
        convolution(f"{name}.conv.0", 2 * width, width)
        convolution(f"{name}.conv.2", width, width)
        convolution(f"{name}.conv.4", width, width)

    convolution("encoder.0", 3 * patch**2, first)
    for place, before, width, time in zip((2, 7, 12), (first, *down), down, times, strict=False):
        found[f"encoder.{place}.conv.weight"] = (before, before * time, 1, 1)
        convolution(f"encoder.{place + 1}", before, width, has_bias=False)
        for block in range(2, 5):
            memory(f"encoder.{place + block}", width)
    convolution("encoder.17", down[-1], channels)
    convolution("decoder.1", channels, up[0])
    for place, width, after, time in zip((3, 9, 15), up, up[1:], times[::-1], strict=False):
        for block in range(3):
            memory(f"decoder.{place + block}", width)
        found[f"decoder.{place + 4}.conv.weight"] = (width * time, width, 1, 1)
        convolution(f"decoder.{place + 5}", width, after, has_bias=False)
    convolution("decoder.22", up[-1], 3 * patch**2)
    return found


def draw_weights(kind: tuple[int, int, tuple[int, int, int]], seed: int = 0) -> dict[str, Tensor]:
    """Draw weights so that signals neither fade nor grow, and pixels are mostly inside [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(*kind, NARROW).items():
        scale = 0.1 if len(shape) == 1 else (2 / np.prod(shape[1:])) ** 0.5
        weights[name] = torch.randn(shape, generator=generator) * scale
    weights["decoder.22.weight"] /= 60
    weights["decoder.22.bias"] += 0.5
    return weights


def write(folder: Path, name: str, weights: dict[str, Tensor]) -> Path:
    path = folder / f"{name}.safetensors"
    save_file(weights, path)
    return path


def geometry_of(kind: tuple[int, int, tuple[int, int, int]]) -> Geometry:
    channels, patch, times = kind
    return Geometry(
        channels=channels,
        time_factor=int(np.prod(times)),
        space_factor=8 * patch,
        multiple=8 * patch,
        native=(64, 64),
        frames=(9,),
    )


def make(folder: Path, kind: str, *, keeps_even: bool = False) -> tuple[Taehv, dict[str, Tensor]]:
    weights = draw_weights(KINDS[kind])
    path = write(folder, "taex", weights)
    file = TinyFile(name="taex", encodes=True, keeps_even=keeps_even)
    tiny_one = read_taehv(path, file, geometry_of(KINDS[kind])).requires_grad_(False)
    return tiny_one, weights


ENCODER: Steps = [("convolve", 0, 1), ("rectify", 1, 0)]
for _at in (2, 7, 12):
    ENCODER += [("pool", _at, 0), ("convolve", _at + 1, 2)]
    ENCODER += [("remember", _at + add, 0) for add in (2, 3, 4)]
ENCODER += [("convolve", 17, 1)]
DECODER: Steps = [("squash", 0, 0), ("convolve", 1, 1), ("rectify", 2, 0)]
for _at in (3, 9, 15):
    DECODER += [("remember", _at + add, 0) for add in (0, 1, 2)]
    DECODER += [("enlarge", _at + 3, 0), ("grow", _at + 4, 0), ("convolve", _at + 5, 1)]
DECODER += [("rectify", 21, 0), ("convolve", 22, 1)]


def push(
    weights: dict[str, Tensor], steps: Steps, kept: dict[int, Any], frame: Tensor
) -> list[Tensor]:
    """Send one frame through the layers; give what comes out. kept: what layers remember."""
    if not steps:
        return [frame]
    (step, place, stride), *rest = steps

    def convolve(name: str, inside: Tensor, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        bias = weights.get(f"{name}.bias")
        return functional.conv2d(inside, weight, bias, stride=stride, padding=padding)

    results = [frame]
    if step == "convolve":
        results = [convolve(str(place), frame, stride)]
    elif step == "rectify":
        results = [frame.clamp(min=0)]
    elif step == "squash":
        results = [3 * torch.tanh(frame / 3)]
    elif step == "enlarge":
        results = [frame.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)]
    elif step == "remember":
        inside = torch.cat([frame, kept.get(place, torch.zeros_like(frame))], dim=1)
        kept[place] = frame
        for layer in (0, 2, 4):
            inside = convolve(f"{place}.conv.{layer}", inside.clamp(min=0) if layer else inside)
        results = [(inside + frame).clamp(min=0)]
    elif step == "pool":
        waiting = [*kept.get(place, []), frame]
        is_full = len(waiting) * frame.shape[1] == weights[f"{place}.conv.weight"].shape[1]
        results = [convolve(f"{place}.conv", torch.cat(waiting, dim=1))] if is_full else []
        kept[place] = [] if is_full else waiting
    elif step == "grow":
        results = list(convolve(f"{place}.conv", frame).split(frame.shape[1], dim=1))
    return [last for one in results for last in push(weights, rest, kept, one)]


def run_half(half: str, steps: Steps, weights: dict[str, Tensor], frames: list[Tensor]) -> Tensor:
    named = {n.removeprefix(f"{half}."): v for n, v in weights.items() if n.startswith(half)}
    kept: dict[int, Any] = {}
    return torch.stack([last for one in frames for last in push(named, steps, kept, one)], dim=2)


def fold(frame: Tensor, patch: int) -> Tensor:
    """Fold pixels into channels: colour, then down, then across."""
    batch, colours, height, width = frame.shape
    cut = frame.reshape(batch, colours, height // patch, patch, width // patch, patch)
    return cut.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // patch, width // patch)


def unfold(frame: Tensor, patch: int) -> Tensor:
    batch, _, height, width = frame.shape
    cut = frame.reshape(batch, 3, patch, patch, height, width)
    return cut.permute(0, 1, 4, 2, 5, 3).reshape(batch, 3, height * patch, width * patch)


def encode(weights: dict[str, Tensor], video: Tensor, *, patch: int, times: int) -> Tensor:
    """Encode as published: pixels from 0 to 1, the last frame repeated until frames are whole."""
    frames = list(((video + 1) / 2).unbind(2))
    while len(frames) % times:
        frames.append(frames[-1])
    return run_half("encoder", ENCODER, weights, [fold(frame, patch) for frame in frames])


def decode(weights: dict[str, Tensor], latents: Tensor, *, patch: int, skipped: int) -> Tensor:
    """Decode as published: the first frames skipped, pixels clamped to 0 to 1."""
    frames = run_half("decoder", DECODER, weights, list(latents.unbind(2))).unbind(2)
    video = torch.stack([unfold(frame, patch) for frame in frames[skipped:]], dim=2)
    return video.clamp(0, 1) * 2 - 1


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video_of(geometry: Geometry, latent_frames: int) -> Tensor:
    side = geometry.space_factor
    frames = 1 + (latent_frames - 1) * geometry.time_factor
    return draw(2, 3, frames, 2 * side, 3 * side).mul(0.5).clamp(-1, 1)
