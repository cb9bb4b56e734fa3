"""What every frozen video model looks like from above, whatever its family."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from .schedule import Schedule
from .spec import Geometry
from .train_config import Suited
from .transition import Transition

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Base(Protocol):
    """A frozen image-to-video model made flat. Axes: B batch, C F h w latents, T H W pixels.

    name, revision: where it came from; an adapter fits one name and revision.
    lora_targets: names of the layers that an adapter changes, as PEFT takes them.
    exact_roles: those of `ROLES` that need fp32, whatever the denoiser is built in.
    batch: images that a prediction answers at once.
    suited: settings of training that suit an adapter, for those that are not given.
    transition: the one that suits the base, for tasks that state none.
    comfy_names: parts of layers' names, and ComfyUI's for them, which published LoRAs have, too;
    None where it has no such model.
    Pixels are in [-1, 1]; latents are normalised to about unit variance.
    """

    name: str
    revision: str
    geometry: Geometry
    schedule: Schedule
    lora_targets: tuple[str, ...]
    exact_roles: tuple[str, ...]
    batch: int
    suited: Suited
    transition: Transition
    comfy_names: Mapping[str, str] | None

    @property
    def device(self) -> "torch.device":
        """Where arithmetic runs."""
        ...

    @property
    def tiny_roles(self) -> tuple[str, ...]:
        """List those of encoder and decoder that a tiny autoencoder serves.

        Its decoder is cheap enough for every update of a training.
        """
        ...

    def networks(self) -> "dict[str, nn.Module]":
        """Give the networks besides the denoiser, by name."""
        ...

    def rest(self) -> None:
        """Let the networks besides the denoiser make room until they are used again."""
        ...

    def play(self, transition: Transition) -> None:
        """Place frames in time as a transition has them: see its `span`.

        Raises: ModelError if the base cannot.
        """
        ...

    def offloaded(self) -> AbstractContextManager[None]:
        """Keep the denoiser on the CPU from now on, and bring its blocks one after the other.

        For prediction. Within the context nothing is brought yet: an adapter is put in place there.
        Raises: ModelError if the base is not made for it.
        """
        ...

    def embed(self, prompt: str) -> "dict[str, Tensor]":
        """Embed a prompt. Shapes: every tensor [1, ...]; a denoiser repeats it over its batch."""
        ...

    def encode(self, video: "Tensor") -> "Tensor":
        """Encode a video. Shapes: [B, 3, T, H, W] -> [B, C, F, h, w]."""
        ...

    def decode(self, latents: "Tensor") -> "Tensor":
        """Decode all frames. Shapes: [B, C, F, h, w] -> [B, 3, T, H, W]."""
        ...

    def decode_last(self, latents: "Tensor") -> "Tensor":
        """Decode only the last frame. Shapes: [B, C, F, h, w] -> [B, 3, H, W]."""
        ...

    def condition(self, image: "Tensor", *, frames: int) -> "dict[str, Tensor]":
        """Give what the denoiser must know of the first frame of F = `frames` latent ones.

        Shapes: [B, 3, H, W] -> [B, ...].
        """
        ...

    def denoiser(self) -> "nn.Module":
        """Give the module that predicts: forward(noisy, time, **conditions, **prompt).

        Shapes: noisy and result [B, C, F, h, w]; time [B]. Its `.transformer` is the diffusers
        model that adapters attach to. The same module is given at every call.
        """
        ...


Conditions = Mapping[str, "Tensor"]
