"""How much memory of a GPU a base takes, estimated without its weights.

The base runs on fake tensors, which have sizes but no content, as `train` and `predict` run it on a
GPU: the denoiser's weights in bf16 unless others are chosen, those of the autoencoder in bf16 or
fp32 as the family has it, arithmetic of training in bf16. What PyTorch would hold of the tensors is
added up.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .cards import BOX, Card, open_empty
from .costs import (
    Video,
    count_adapter,
    list_targets,
    make_inputs,
    matrix_shape,
    open_on_meta,
    predict,
)
from .train_config import FEW_BITS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .base import Base

    Empty = Callable[..., Base]  # opens the base without weights, with `layers` blocks

# In fp32, each: the weight, its gradient, two moments of AdamW, and the averaged weight.
ADAPTER_BYTES = 5 * 4
# Of a frozen weight; nf4 has a scale in fp32 for each 64 weights.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
FEW = 2  # blocks; from there on, each one more adds the same memory


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory in bytes: weights, and the most that comes and goes beside them.

    denoiser: of both experts, where there are two. encoders: the autoencoder and the image encoder,
    which are there only while they work; the text encoder is let go before. adapter: LoRA weights,
    gradients, two moments and the average. activations: of one prediction, or of one update.
    coding: of encoding or decoding one video. text: of embedding the prompt, before all else.
    Workspaces of kernels are left out.
    """

    denoiser: int
    encoders: int
    adapter: int
    activations: int
    coding: int
    text: int

    @property
    def total(self) -> int:
        """The most that is there at once: panels are decoded between updates."""
        working = max(self.activations, self.encoders + self.coding)
        return max(self.text, self.denoiser + self.adapter + working)


def measure_memory(
    card: Card, video: Video, *, rank: int, weights: str = "auto", checkpointing: bool = True
) -> dict[str, Memory]:
    """Estimate the memory to "train" LoRA on a frozen denoiser and to "predict" with it merged.

    Predicting is of one video at a time, with weights in fp32 or bf16; "offload" is the same with
    blocks that come one by one, each while the one before computes. Of an update with gradient
    checkpointing, the input of every block stays, and the activations of one block at a time come
    on top; without, those of all blocks stay. Either way memory grows evenly with the blocks: it is
    followed for a few of them, and drawn on to all. weights: as in `TrainConfig`.
    Raises: ModelError if the base does not take such a video.
    """
    kept = card.weights if weights == "auto" or card.name == BOX else weights
    empty = partial(
        open_empty, card, weights="fp32" if kept == "fp32" else "bf16", coder=card.weights
    )
    one = replace(video, batch=1)
    whole = open_on_meta(card)
    count = card.experts * _count(whole.denoiser())
    predicting = Memory(
        denoiser=round(WEIGHT_BYTES["fp32" if kept == "fp32" else "bf16"] * count),
        encoders=_encoder_bytes(empty),
        adapter=0,
        activations=_pass_peak(empty, one),
        coding=_coding_peak(empty, one),
        text=0,  # a run keeps its prompt
    )
    few, more = (
        _update_peak(partial(empty, layers=layers), video, rank, checkpointing)
        for layers in (FEW, FEW + 1)
    )
    training = replace(
        predicting,
        denoiser=round(WEIGHT_BYTES[kept] * count),
        adapter=ADAPTER_BYTES * count_adapter(card, rank=rank),
        activations=few + (card.layers - FEW) * (more - few),
        text=_text_bytes(card),
    )
    if kept in FEW_BITS:  # these are on the GPU from the beginning
        training = replace(training, text=training.text + training.denoiser)
    kept_there = WEIGHT_BYTES["fp32" if kept == "fp32" else "bf16"] * _offloaded(card)
    offloaded = replace(predicting, denoiser=round(kept_there))
    return {"train": training, "predict": predicting, "offload": offloaded}


def _offloaded(card: Card) -> int:
    """Count the weights that are there at most: two blocks, and those in no block."""
    import torch

    with torch.device("meta"):
        return _count(open_empty(card, layers=2).denoiser())


def _text_bytes(card: Card) -> int:
    """Give the weights of the text encoder, in bf16."""
    return 2 * int(card.text_encoder["parameters"]) if card.text_encoder else 0


def _encoder_bytes(empty: "Empty") -> int:
    import torch

    with torch.device("meta"):
        networks = empty(layers=1).networks().values()
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _count(network: "nn.Module") -> int:
    return sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))


def _pass_peak(empty: "Empty", video: Video) -> int:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        base = empty(layers=FEW)
        inputs = make_inputs(base, video)
        return _peak(lambda: predict(base, inputs))


def _coding_peak(empty: "Empty", video: Video) -> int:
    """Give the most that encoding or decoding videos holds beside the weights."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    height, width = video.size
    with FakeTensorMode(), torch.no_grad():
        base = empty(layers=FEW)
        shape = base.geometry.latent_shape(frames=video.frames, height=height, width=width)
        pixels = torch.empty(video.batch, 3, video.frames, height, width)
        latents = torch.empty(video.batch, *shape)
        return max(_peak(lambda: base.encode(pixels)), _peak(lambda: base.decode_last(latents)))


def _update_peak(empty: "Empty", video: Video, rank: int, checkpointing: bool) -> int:
    """Follow one update of an adapter."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from .device import arithmetic

    with FakeTensorMode():
        base = empty()
        with torch.no_grad():
            inputs = make_inputs(base, video)
        _attach(base, rank)
        transformer: Any = base.denoiser().get_submodule("transformer")
        if checkpointing:
            transformer.enable_gradient_checkpointing()

        def update() -> None:
            with arithmetic(base.device, "bf16"):
                prediction = predict(base, inputs)
            prediction.float().square().mean().backward()  # type: ignore[no-untyped-call]

        return _peak(update)


def _attach(base: "Base", rank: int) -> None:
    """Put matrices of an adapter beside the linear layers that take one (convolutions are small).

    PEFT itself cannot move fake tensors.
    """
    import torch
    from torch import nn

    for layer in list_targets(base):
        if isinstance(layer, nn.Linear):
            outputs, inputs = matrix_shape(layer)
            down, up = torch.empty(rank, inputs), torch.empty(outputs, rank)
            for matrix in (down, up):
                matrix.requires_grad = True
                matrix.grad = torch.zeros_like(matrix)  # counted with the adapter
            layer.register_forward_hook(_beside(down, up))


def _beside(down: "Tensor", up: "Tensor") -> "Callable[..., Tensor]":
    from torch.nn.functional import linear

    return lambda _, args, output: output + linear(linear(args[0], down), up)


def _peak(compute: Callable[[], Any]) -> int:
    """Run something on fake tensors; give the most bytes it held at once beside what was there."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    held: dict[int, int] = {}
    peak = 0

    def note(values: Any, *, is_new: bool) -> None:
        nonlocal peak
        for value in tree_leaves(values):
            if hasattr(value, "untyped_storage"):
                storage = value.untyped_storage()
                if storage._cdata not in held:
                    held[storage._cdata] = storage.nbytes() if is_new else 0
                    weakref.finalize(storage, held.pop, storage._cdata)
        peak = max(peak, sum(held.values()))

    class Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            note((args, kwargs), is_new=False)
            result = func(*args, **(kwargs or {}))
            note(result, is_new=True)
            return result

    with Follow():  # type: ignore[no-untyped-call]
        compute()
    return peak
