"""What a base costs, counted without its weights: parameters, tokens, arithmetic, seconds on a GPU.

The base itself runs, at its full size, on the meta device: the figures are those of its layers.
Units: TFLOP are 10^12; a multiplication and its addition count two. GB are 10^9 bytes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from .cards import Card, open_empty

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .base import Base

GB, TERA = 1e9, 1e12
UTILISATION = 0.4  # of a GPU's peak: what training commonly reaches
HEADROOM = 0.1  # of the memory that is needed, for CUDA itself and for gaps


@dataclass(frozen=True, kw_only=True)
class Video:
    """What goes through a base at once: `batch` videos of T = `frames` and `size` (H, W)."""

    frames: int
    size: tuple[int, int]
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One prediction for one video: its tokens, the prompt's not counted, and its arithmetic.

    attention_flop: of it, queries times keys, and what comes of them times values.
    """

    tokens: int
    flop: int
    attention_flop: int

    def training_flop(self, *, checkpointing: bool) -> int:
        """Count the arithmetic of one update; with checkpointing it goes forward twice.

        Going back costs as much as going forward, since frozen weights take no gradient; attention
        costs twice as much. What the adapter adds is left out.
        """
        return (3 if checkpointing else 2) * self.flop + self.attention_flop


@dataclass(frozen=True)
class GPU:
    """A GPU: dense bf16 arithmetic at its peak, and its memory."""

    name: str
    peak_tflops: float
    memory_gb: float

    def holds(self, size_bytes: int) -> bool:
        """Say whether its memory suffices, with some headroom."""
        return size_bytes * (1 + HEADROOM) <= self.memory_gb * GB

    def seconds(self, flop: float) -> float:
        """Estimate how long so much arithmetic takes at `UTILISATION`."""
        return flop / (self.peak_tflops * TERA * UTILISATION)


# Source: NVIDIA's data sheets, without sparsity; of the SXM form where there are several.
GPUS = (
    GPU("RTX 4090", 165, 24),
    GPU("L40S", 362, 48),
    GPU("A100", 312, 80),
    GPU("H100", 989, 80),
    GPU("H200", 989, 141),
)


def this_gpu() -> GPU | None:
    """Give the GPU of this machine, if it has one; a peak that is not known here is no number."""
    import torch

    if not torch.cuda.is_available():
        return None
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    peaks = (gpu.peak_tflops for gpu in GPUS if gpu.name in name)
    return GPU(name, next(peaks, math.nan), memory / GB)


def count_parameters(card: Card) -> dict[str, int]:
    """Count the parameters of each part; of the transformer, those of all experts."""
    base = open_on_meta(card)
    networks = {"denoiser": base.denoiser()} | base.networks()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in networks.items()}
    encoder = card.text_encoder or {"parameters": 0}
    return {
        "transformer": counts["denoiser"] * card.experts,
        "vae": counts["autoencoder"],
        "text_encoder": encoder["parameters"],
        "image_encoder": counts.get("image_encoder", 0),
    }


def count_adapter(card: Card, *, rank: int) -> int:
    """Count the parameters of LoRA on all layers that the family names, in all experts."""
    layers = list_targets(open_on_meta(card))
    return rank * card.experts * sum(sum(matrix_shape(layer)) for layer in layers)


def measure_pass(card: Card, video: Video) -> Pass:
    """Count the tokens and the arithmetic of one prediction for one video.

    Of two experts, one predicts at a time.
    Raises: ModelError if the base does not take such a video.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    seen: list[Tensor] = []

    def note(_: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        seen.append(named["hidden_states"] if "hidden_states" in named else args[0])

    base = open_on_meta(card)
    hook = list_blocks(base)[0].register_forward_pre_hook(note, with_kwargs=True)
    with torch.device("meta"), torch.no_grad():
        inputs = make_inputs(base, replace(video, batch=1))
        with FlopCounterMode(display=False) as counter:
            predict(base, inputs)
    hook.remove()
    # The meta device takes attention apart into products in batches; nothing else is one.
    operators = counter.get_flop_counts()["Global"]
    attention = sum(flop for operator, flop in operators.items() if "bmm" in str(operator))
    return Pass(tokens=seen[0].shape[1], flop=counter.get_total_flops(), attention_flop=attention)


def make_inputs(base: "Base", video: Video) -> "dict[str, Tensor]":
    """Make what the denoiser takes, on the device that is the default.

    Raises: ModelError if the size or the number of frames does not fit the base.
    """
    import torch

    height, width = video.size
    shape = base.geometry.latent_shape(frames=video.frames, height=height, width=width)
    image = torch.empty(video.batch, 3, height, width)
    inputs = {"noisy": torch.empty(video.batch, *shape), "time": torch.ones(video.batch)}
    return inputs | base.condition(image, frames=shape[1]) | base.embed("")


def predict(base: "Base", inputs: "Mapping[str, Tensor]") -> "Tensor":
    """Predict once."""
    prediction: Tensor = base.denoiser()(**inputs)
    return prediction


@cache
def open_on_meta(card: Card) -> "Base":
    """Make a base of a card's full size, without weights; the same at every call."""
    import torch

    with torch.device("meta"):
        return open_empty(card)


def list_blocks(base: "Base") -> "nn.ModuleList":
    """Give the blocks of a base's transformer."""
    from torch.nn import ModuleList

    children = base.denoiser().get_submodule("transformer").children()
    return next(child for child in children if isinstance(child, ModuleList))


def list_targets(base: "Base") -> "list[nn.Module]":
    """Give the layers that an adapter changes, found by the end of their names as PEFT does."""
    names = tuple(f".{name}" for name in base.lora_targets)
    layers = base.denoiser().get_submodule("transformer").named_modules()
    return [layer for name, layer in layers if f".{name}".endswith(names)]


def matrix_shape(layer: "nn.Module") -> tuple[int, int]:
    """Give (outputs, inputs) of a layer's weight as a matrix; of a convolution, all its taps."""
    weight = layer.get_parameter("weight")
    return len(weight), weight.numel() // len(weight)
