"""What bases made from diffusers' pipelines share: their networks are where they are needed.

A text encoder, an autoencoder and a denoiser of five billion weights do not fit one small GPU
together, and need not: prompts and frames are encoded once, before the denoiser begins. A tiny
autoencoder can stand in for the family's own.
Axes: B batch, C F h w latents, T H W pixels, L tokens, D width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from .checkpoints import digest_file
from .errors import ModelError
from .schedule import Schedule
from .spec import Geometry
from .taehv import Taehv, TinyFile, read_taehv
from .transition import Transition

M = TypeVar("M", bound=nn.Module)


class Denoiser(nn.Module):
    """A transformer behind the one layout that all bases share.

    last_place: where in time the last latent frame lies, counted in latent frames (merged, where
    the transformer merges them); None leaves it in its own place.
    """

    last_place: int | None = None

    def places(self, frames: int) -> list[int]:
        """List where each of so many latent frames lies in time."""
        last = frames - 1 if self.last_place is None else self.last_place
        return [*range(frames - 1), last]

    def pick(self, table: Tensor, frames: int, *, axis: int) -> Tensor:
        """Take the places of so many frames out of a table over all frames up to the last place.

        axis: that over tokens, frame by frame.
        """
        by_frame = torch.unflatten(table, axis, (self.places(frames)[-1] + 1, -1))
        return by_frame.index_select(axis, self.line(frames, table.device)).flatten(axis, axis + 1)

    def line(self, frames: int, device: torch.device) -> Tensor:
        """Give the places as a tensor, made where it is used.

        A list would be captured as a constant on the CPU, from where a CUDA graph copies nothing.
        """
        line, last = torch.arange(frames, device=device), self.places(frames)[-1]
        return line if last == frames - 1 else torch.where(line == frames - 1, last, line)


D = TypeVar("D", bound=Denoiser)


class PipelineBase(Generic[D]):
    """The part of a `fewshot_rt.base.Base` that no family changes.

    others: the networks besides the denoiser, by name. encode_prompt: gives [1, L, D]. device:
    where networks come to when they are used, from the CPU; None leaves them where they are.
    tiny_file: the published tiny autoencoder for the family's latents, if there is one.
    """

    batch = 1
    exact_roles: tuple[str, ...] = ()
    geometry: Geometry
    tiny_file: TinyFile | None = None

    def __init__(
        self,
        *,
        denoiser: D,
        others: Mapping[str, nn.Module | None],
        encode_prompt: Callable[[str], Tensor],
        schedule: Schedule,
        name: str,
        revision: str,
        device: str | None,
    ) -> None:
        self.name, self.revision, self.schedule = name, revision, schedule
        self._denoiser, self._encode_prompt, self._device = denoiser, encode_prompt, device
        self._others: dict[str, nn.Module] = {n: m for n, m in others.items() if m is not None}
        self._prompts: dict[str, Tensor] = {}
        self._tiny: Taehv | None = None
        self._is_offloaded = False
        modules: list[nn.Module] = [denoiser, *self._others.values()]
        for module in modules:
            module.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where arithmetic runs."""
        if self._device is None:
            return next(self._denoiser.parameters()).device
        return torch.device(self._device)

    def networks(self) -> dict[str, nn.Module]:
        """Give the networks besides the denoiser by name, on the device."""
        return {name: self._bring(module) for name, module in self._others.items()}

    @property
    def tiny_roles(self) -> tuple[str, ...]:
        """List those of encoder and decoder that a tiny autoencoder serves."""
        if self._tiny is None:
            return ()
        return ("encoder", "decoder") if self._tiny.has_encoder else ("decoder",)

    @property
    def autoencoder(self) -> Any:
        """The autoencoder, on the device."""
        return self._bring(self._others["autoencoder"])

    def rest(self) -> None:
        """Let the networks besides the denoiser wait on the CPU until they are used again."""
        if self._device is not None:
            for module in self._others.values():
                _move(module, "cpu")

    def denoiser(self) -> D:
        """Give the module that predicts; the same at every call."""
        return self._denoiser if self._is_offloaded else self._bring(self._denoiser)

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        """Keep the denoiser on the CPU from now on, and bring its blocks one after the other.

        Within the context nothing is brought yet: an adapter is put in place there. On a GPU the
        next block comes while one computes, from memory that is locked for it.
        """
        device = self.device
        self._device, self._is_offloaded = str(device), True
        _move(self._denoiser, "cpu")
        yield
        has_streams = device.type != "cpu"
        for module in self._denoiser.modules():
            if isinstance(module, ModelMixin):
                module.enable_group_offload(
                    onload_device=device,
                    num_blocks_per_group=1,
                    use_stream=has_streams,
                    record_stream=has_streams,
                )

    def play(self, transition: Transition) -> None:
        """Place the last latent frame in time where a transition has it.

        Raises: ModelError if the span does not fit, or all frames are merged into one.
        """
        if transition.span is None:
            self._denoiser.last_place = None
            return
        if self.geometry.is_fixed:
            raise ModelError(
                f"{self.name} learned the places of its frames one by one: leave out --drop-after, "
                "and span in the transition of task.toml."
            )
        factor, merged = self.geometry.time_factor, self.geometry.merged_frames
        if (transition.span - 1) % factor:
            raise ModelError(
                f"a span of {transition.span} frames does not fit {self.name}: use 1 + a multiple "
                f"of {factor}."
            )
        if transition.frames <= factor * (merged - 1) + 1:
            raise ModelError(
                f"{self.name} merges {transition.frames} frames into one, and the answer has no "
                f"place in time of its own. Use {self.geometry.frames[0]} frames, or no span."
            )
        self._denoiser.last_place = (transition.span - 1) // factor // merged

    def embed(self, prompt: str) -> dict[str, Tensor]:
        """Embed a prompt; the text encoder is loaded for it, and let go. Shapes: [1, L, D]."""
        if prompt not in self._prompts:
            self._prompts[prompt] = self._encode_prompt(prompt)
        return {"prompt": self._prompts[prompt].to(self.device)}

    def use_tiny(self, path: Path) -> None:
        """Decode with a tiny autoencoder from now on, and encode where its encoder serves.

        The revision tells which: what was encoded or trained with another does not fit.
        Raises: ModelError if the family has none, or the file does not fit.
        """
        if self.tiny_file is None:
            raise ModelError(
                f"no tiny autoencoder is known for the latents of {self.name}. Leave out --vae."
            )
        tiny = read_taehv(path, self.tiny_file, self.geometry).eval().requires_grad_(False)
        self._others["autoencoder" if tiny.has_encoder else "tiny_autoencoder"] = tiny
        self._tiny = tiny
        # An encoder may hold more than the autoencoder.
        self.exact_roles = tuple(role for role in self.exact_roles if role != "decoder")
        self.revision = f"{self.revision}+{digest_file(path)}"

    def encode(self, video: Tensor) -> Tensor:
        """Encode a video. Shapes: [B, 3, T, H, W] -> [B, C, F, h, w]."""
        if self._tiny is None or not self._tiny.has_encoder:
            return _one_by_one(self._encode, video)
        return self._bring(self._tiny).encode(video)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode all frames. Shapes: [B, C, F, h, w] -> [B, 3, T, H, W]."""
        if self._tiny is None:
            return _one_by_one(self._decode, latents)
        return self._bring(self._tiny).decode(self._for_tiny(latents))

    def decode_last(self, latents: Tensor) -> Tensor:
        """Decode the last frame.

        Of the family's own autoencoder all go through: it depends on those before.
        Shapes: [B, C, F, h, w] -> [B, 3, H, W].
        """
        if self._tiny is None:
            return _one_by_one(self._decode, latents)[:, :, -1]
        return self._bring(self._tiny).decode_last(self._for_tiny(latents))

    def _encode(self, video: Tensor) -> Tensor:
        """Encode with the family's own autoencoder."""
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode with the family's own autoencoder."""
        raise NotImplementedError

    def _typed(self, values: Tensor) -> Tensor:
        """Give values in the type in which the family's own autoencoder computes."""
        return values.to(next(self._others["autoencoder"].parameters()).dtype)

    def _for_tiny(self, latents: Tensor) -> Tensor:
        """Give latents as the family's tiny autoencoder takes them."""
        return latents

    def _bring(self, module: M) -> M:
        return module if self._device is None else _move(module, self._device)


def _one_by_one(code: Callable[[Tensor], Tensor], videos: Tensor) -> Tensor:
    """Encode or decode videos one after the other: large ones take gigabytes each.

    A captured graph takes them together, since its batch has no number yet.
    """
    if torch.compiler.is_compiling() or len(videos) == 1:
        return code(videos)
    return torch.cat([code(video) for video in torch.split(videos, 1)])


def _move(module: M, device: str) -> M:
    """Move a module unless it is there: while a graph is captured, nothing may be moved."""
    if next(module.parameters()).device.type != torch.device(device).type:
        module.to(device)
    return module
