"""A base cut into its three roles: modules with flat, named tensors, and their signatures.

encoder: what the first frame tells; denoiser: one prediction; decoder: the last frame.
Axes: B batch, C channels, F latent frames, h w latent grid, H W pixels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .base import Base
from .device import enough_memory
from .spec import ROLES, Signature, TensorSpec

BATCH = "batch"


class Role(nn.Module):
    """One role of a base: takes and gives tensors in the order of its signature."""

    def __init__(
        self, forward: Callable[..., tuple[Tensor, ...]], parts: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Shapes: as the signature of the role says."""
        return self._forward(*tensors)


def make_roles(base: Base, signatures: Mapping[str, Signature]) -> dict[str, Role]:
    """Cut a base into its roles, with the tensors that `make_signatures` found."""
    video, _, *others = signatures["denoiser"].inputs
    condition_names = tuple(spec.name for spec in others)
    frames = int(video.axes[2])

    def encode(image: Tensor) -> tuple[Tensor, ...]:
        conditions = base.condition(image, frames=frames)
        return tuple(conditions[name] for name in sorted(conditions))

    denoiser = base.denoiser()

    def denoise(noisy: Tensor, time: Tensor, *conditions: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(condition_names, conditions, strict=True))
        return (denoiser(noisy, time, **named),)

    def decode(latents: Tensor) -> tuple[Tensor, ...]:
        return (base.decode_last(latents),)

    parts = base.networks()
    return {
        "encoder": Role(encode, parts),
        "denoiser": Role(denoise, {"denoiser": denoiser}),
        "decoder": Role(decode, parts),
    }


@torch.no_grad()
def make_signatures(
    base: Base,
    prompt: Mapping[str, Tensor],
    *,
    latents: tuple[int, int, int, int],
    size: tuple[int, int],
    batch: int,
    least: int = 1,
) -> dict[str, Signature]:
    """Describe the tensors of each role for one video shape and batches from `least` to `batch`.

    latents: (C, F, h, w), as `Geometry.latent_shape` gives it. size: (H, W).
    """
    height, width = size
    image = torch.zeros(1, 3, height, width, device=base.device)
    conditions = base.condition(image, frames=latents[1])
    batched = [_spec(name, conditions[name], BATCH) for name in sorted(conditions)]
    fixed = [_spec(name, prompt[name], 1) for name in sorted(prompt)]
    pixels = TensorSpec("image", "float32", (BATCH, 3, height, width))
    sizes = {BATCH: (least, max(least, min(2, batch)), batch)}

    def video(name: str) -> TensorSpec:
        return TensorSpec(name, "float32", (BATCH, *latents))

    inputs = (video("noisy"), TensorSpec("time", "float32", (BATCH,)), *batched, *fixed)
    prediction = (video("prediction"),)
    return {
        "encoder": Signature(inputs=(pixels,), outputs=tuple(batched), sizes=sizes),
        "denoiser": Signature(inputs=inputs, outputs=prediction, sizes=sizes),
        "decoder": Signature(inputs=(video("latents"),), outputs=(pixels,), sizes=sizes),
    }


def run_eagerly(
    role: nn.Module, signature: Signature, *, device: torch.device
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Wrap a role so that it takes and gives NumPy arrays by name."""

    @torch.inference_mode()
    def runner(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        given = [torch.from_numpy(tensors[spec.name]).to(device) for spec in signature.inputs]
        with enough_memory():
            results = role(*given)
        return {
            spec.name: value.float().cpu().numpy()
            for spec, value in zip(signature.outputs, results, strict=True)
        }

    return runner


def eager_runners(
    base: Base, signatures: Mapping[str, Signature]
) -> dict[str, Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]]:
    """Give the three roles of a base as functions of NumPy arrays."""
    roles = make_roles(base, signatures)
    return {name: run_eagerly(roles[name], signatures[name], device=base.device) for name in ROLES}


def _spec(name: str, tensor: Tensor, first: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", (first, *tensor.shape[1:]))
