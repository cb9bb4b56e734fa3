"""Wan 2.1 and 2.2, image to video, from a folder in diffusers' layout.

Flow matching over the latents of a causal 3D autoencoder. Three ways to take the first frame:
- Wan2.1-I2V-14B and Wan2.2-I2V-A14B: as a video whose other frames are grey, encoded, with a mask,
  as channels beside the noisy ones; Wan2.1 also sees it through CLIP;
- Wan2.2-TI2V-5B: as the first latent frame itself, clean, its tokens at time 0.
Wan2.2-I2V-A14B consists of two transformers, one for the noisier times.
Axes: B batch, C channels, T frames, H W pixels, F latent frames, h w latent grid, L tokens, D
width, N tokens of CLIP.
Source: Wan team 2025 (Wan: open and advanced large-scale video generative models); the details are
those of diffusers' pipeline.
"""

import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from ..checkpoints import INDEX_FILE, digest_folder, read_network
from ..errors import ModelError
from ..pipeline_base import Denoiser, PipelineBase
from ..schedule import Schedule
from ..spec import Geometry
from ..taehv import TinyFile
from ..text import encode_text
from ..train_config import Suited
from ..transition import Transition

PIPELINES = ("WanImageToVideoPipeline", "WanPipeline")
STEPS = 1000  # the transformers count time from 0 to here, in whole steps
PROMPT_TOKENS = 512  # fixed in the attention of diffusers' Wan
SMALL, LARGE, WIDE = (480, 832), (720, 1280), (704, 1280)
LARGE_SHIFT = 5.0  # the scheduler of the checkpoint for 720p shifts times by this, for 480p less
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP
# The tiny encoder sees 3 frames ahead of each latent frame: of a first frame before grey ones it
# would see grey, too. There only the decoder stands in.
TINY, TINY_WIDE = TinyFile(name="taew2_1", encodes=False), TinyFile(name="taew2_2", encodes=True)
# ComfyUI has the names of Wan's own code (comfy/ldm/wan/model.py). The layers of adapters come
# first; acceleration LoRAs change all of them.
COMFY_NAMES = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "norm2": "norm3",
    "norm_added_k": "norm_k_img",
    ".scale_shift_table": "head.modulation",
    "scale_shift_table": "modulation",
    "proj_out": "head.head",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
}


class Experts(nn.Module):
    """Two transformers, the first for times from a boundary on; named as in the folder.

    Where a graph is captured, both run at every step and the boundary chooses; else only those
    that a batch needs.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        transformer_2: WanTransformer3DModel,
        *,
        boundary: float,
    ) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    @property
    def config(self) -> Any:
        """Give the configuration, the same for both."""
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        """Give the type of the weights, the same for both."""
        kind: torch.dtype = self.transformer.dtype
        return kind

    def forward(self, hidden_states: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
        """Predict as `WanTransformer3DModel` does. Shapes: timestep [B]."""
        is_first = timestep >= self.boundary * STEPS
        if not torch.compiler.is_compiling() and bool(is_first.all() | ~is_first.any()):
            expert = self.transformer if is_first.all() else self.transformer_2
            return (expert(hidden_states, timestep, **others)[0],)
        first = self.transformer(hidden_states, timestep, **others)[0]
        second = self.transformer_2(hidden_states, timestep, **others)[0]
        return (torch.where(is_first[:, None, None, None, None], first, second),)


class WanDenoiser(Denoiser):
    """The transformer, or the two of them, behind the one layout that all bases share."""

    def __init__(self, transformer: WanTransformer3DModel | Experts) -> None:
        super().__init__()
        self.transformer, self.dtype = transformer, transformer.dtype
        for module in transformer.modules():
            if isinstance(module, WanTransformer3DModel):
                module.rope.register_forward_hook(_placed_by(weakref.ref(self)))

    def forward(
        self,
        noisy: Tensor,
        time: Tensor,
        prompt: Tensor,
        *,
        first: Tensor | None = None,
        known: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> Tensor:
        """Predict noise - clean; with `first`, the first frame's leads exactly to it.

        Shapes: noisy, result [B, C, F, h, w]; time [B] in (0, 1]; prompt [1, L, D];
        first [B, C, 1, h, w], or known [B, 4 + C, F, h, w] and image_tokens [B, N, D].
        """
        # Whole steps, of which the first is 999. The addend mends what fp32 loses.
        step = (time * STEPS + 1e-3).floor().clamp(max=STEPS - 1)
        if first is not None:
            seen, timestep = torch.cat([first, noisy[:, :, 1:]], dim=2), self._by_token(noisy, step)
        elif known is not None:
            seen, timestep = torch.cat([noisy, known], dim=1), step
        prediction: Tensor = self.transformer(
            hidden_states=seen.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=prompt.expand(noisy.shape[0], -1, -1).to(self.dtype),
            encoder_hidden_states_image=None
            if image_tokens is None
            else image_tokens.to(self.dtype),
            return_dict=False,
        )[0].to(noisy.dtype)
        if first is None:
            return prediction
        towards_first = (noisy[:, :, :1] - first) / time[:, None, None, None, None]
        return torch.cat([towards_first, prediction[:, :, 1:]], dim=2)

    def place(self, rotary: Any, seen: tuple[Tensor], tables: Any) -> Any:
        """Give the rotary tables of the last frame's own place. Shapes: seen [B, C, F, h, w]."""
        if self.last_place is None:
            return tables
        frames = seen[0].shape[2]
        longer = seen[0][:, :, :1].expand(-1, -1, self.last_place + 1, -1, -1)
        return tuple(self.pick(table, frames, axis=1) for table in rotary.forward(longer))

    def _by_token(self, noisy: Tensor, step: Tensor) -> Tensor:
        """Give each token its time: 0 for the first frame. Shapes: [B] -> [B, L]."""
        frames, height, width = noisy.shape[2:]
        _, down, across = self.transformer.config.patch_size
        count = (height // down) * (width // across)
        later = step[:, None].expand(-1, (frames - 1) * count)
        return torch.cat([step.new_zeros(step.shape[0], count), later], dim=1)


def _placed_by(denoiser: "weakref.ref[WanDenoiser]") -> Callable[..., Any]:
    """Make a hook that does not keep its denoiser alive."""

    def hook(rotary: Any, seen: tuple[Tensor], tables: Any) -> Any:
        owner = denoiser()
        return tables if owner is None else owner.place(rotary, seen, tables)

    return hook


class ImageEncoder(nn.Module):
    """CLIP's tower for images, and how it wants them."""

    def __init__(self, tower: nn.Module, *, side: int) -> None:
        super().__init__()
        self.tower, self.side = tower, side

    def forward(self, image: Tensor) -> Tensor:
        """Give the last layer but one. Shapes: [B, 3, H, W] in [-1, 1] -> [B, N, D]."""
        hidden: Tensor = self.tower(self.prepare(image), output_hidden_states=True).hidden_states[
            -2
        ]
        return hidden

    def prepare(self, image: Tensor) -> Tensor:
        """Fit the shorter side, cut out the middle and normalise.

        Shapes: [B, 3, H, W] in [-1, 1] -> [B, 3, side, side].
        """
        shorter = min(image.shape[-2:])
        size = [self.side * length // shorter for length in image.shape[-2:]]
        if size != list(image.shape[-2:]):
            image = functional.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = ((length - self.side) // 2 for length in size)
        image = image[..., top : top + self.side, left : left + self.side] / 2 + 0.5
        mean, std = (image.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return (image - mean) / std


class WanBase(PipelineBase[WanDenoiser]):
    """A frozen Wan; see `fewshot_rt.base.Base`."""

    # Acuaviva et al. 2025; the layers are not stated there, but follow from their sizes.
    exact_roles = ("encoder", "decoder")  # as diffusers runs Wan's autoencoder
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "ffn.net.0.proj", "ffn.net.2")
    suited = Suited(batch=1, rate=1e-4, rank=64, alpha=32, clip=0.05, checkpointing=True)
    transition = Transition(kind="discrete", frames=9)
    comfy_names: Mapping[str, str] | None = COMFY_NAMES

    def __init__(
        self,
        *,
        transformer: WanTransformer3DModel | Experts,
        autoencoder: AutoencoderKLWan,
        image_encoder: ImageEncoder | None,
        schedule: Schedule,
        is_first_clean: bool,
        encode_prompt: Callable[[str], Tensor],
        name: str,
        revision: str,
        device: str | None = None,
    ) -> None:
        self.is_first_clean = is_first_clean
        self.tiny_file = TINY_WIDE if is_first_clean else TINY
        if image_encoder is not None:
            self.lora_targets = (*self.lora_targets, "add_k_proj", "add_v_proj")
        scales = autoencoder.config
        space = scales.scale_factor_spatial
        large = LARGE if image_encoder and schedule.shift >= LARGE_SHIFT else SMALL
        self.geometry = Geometry(
            channels=scales.z_dim,
            time_factor=scales.scale_factor_temporal,
            space_factor=space,
            multiple=space * transformer.config.patch_size[1],
            native=WIDE if is_first_clean else large,
            frames=(5, 9),
            known_frames=int(is_first_clean),
        )
        super().__init__(
            denoiser=WanDenoiser(transformer),
            others={"autoencoder": autoencoder, "image_encoder": image_encoder},
            encode_prompt=encode_prompt,
            schedule=schedule,
            name=name,
            revision=revision,
            device=device,
        )

    @property
    def image_encoder(self) -> Any:
        """CLIP, on the device; None where there is none."""
        tower = self._others.get("image_encoder")
        return tower and self._bring(tower)

    def _encode(self, video: Tensor) -> Tensor:
        latents: Tensor = self.autoencoder.encode(video).latent_dist.mode()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        video: Tensor = self.autoencoder.decode(latents * std + mean).sample
        return video

    def condition(self, image: Tensor, *, frames: int) -> dict[str, Tensor]:
        """Encode the first frame, in the version's own way.

        Shapes: image [B, 3, H, W]; first [B, C, 1, h, w], or known [B, 4 + C, F, h, w] and, for
        Wan2.1, image_tokens [B, N, D].
        """
        if self.is_first_clean:
            return {"first": self.encode(image[:, :, None])}
        grey = (frames - 1) * self.geometry.time_factor
        video = functional.pad(image[:, :, None], (0, 0, 0, 0, 0, grey))
        latents = self.encode(video)
        mask = torch.zeros_like(latents[:, :1]).repeat(1, self.geometry.time_factor, 1, 1, 1)
        mask[:, :, 0] = 1
        conditions = {"known": torch.cat([mask, latents], dim=1)}
        if self.image_encoder is not None:
            conditions["image_tokens"] = self.image_encoder(image)
        return conditions

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.autoencoder.config
        return (
            like.new_tensor(config.latents_mean)[:, None, None, None],
            like.new_tensor(config.latents_std)[:, None, None, None],
        )


def open_base(name: str, *, device: str = "cpu", weights: str = "auto") -> WanBase:
    """Open a folder with a Wan image-to-video pipeline. weights: see `read_network`.

    Raises: ModelError if a file is missing or damaged, or it makes videos of text alone.
    """
    folder = Path(name)
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        is_first_clean = bool(index.get("expand_timesteps"))
        boundary = index.get("boundary_ratio")
        transformer = _transformer(folder, boundary=boundary, device=device, weights=weights)
        autoencoder = read_network(AutoencoderKLWan, folder / "vae", device=device, weights="fp32")
        image_encoder = _image_encoder(folder) if transformer.config.image_dim else None
        schedule = _schedule(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the base in {folder} cannot be read ({error}). Download all of its files again."
        ) from error
    seen = transformer.config.in_channels
    if not is_first_clean and seen == autoencoder.config.z_dim:
        raise ModelError(
            f"the base in {folder} makes videos of text alone. Take one that begins with an image, "
            "such as Wan-AI/Wan2.2-TI2V-5B-Diffusers."
        )
    return WanBase(
        transformer=transformer,
        autoencoder=autoencoder,
        image_encoder=image_encoder,
        schedule=schedule,
        is_first_clean=is_first_clean,
        encode_prompt=lambda prompt: _encode_prompt(folder, prompt, device=device),
        name=folder.resolve().name,
        revision=digest_folder(folder),
        device=device,
    )


def _transformer(
    folder: Path, *, boundary: float | None, device: str, weights: str
) -> WanTransformer3DModel | Experts:
    names = ("transformer",) if boundary is None else ("transformer", "transformer_2")
    found = [
        read_network(WanTransformer3DModel, folder / name, device=device, weights=weights)
        for name in names
    ]
    return found[0] if boundary is None else Experts(*found, boundary=boundary)


def _image_encoder(folder: Path) -> ImageEncoder:
    from transformers import CLIPVisionModel

    tower: Any = CLIPVisionModel.from_pretrained(folder / "image_encoder")
    return ImageEncoder(tower, side=tower.config.image_size)


def _schedule(folder: Path) -> Schedule:
    """Read the schedule of a pipeline's scheduler: UniPC's times, or Euler's, for flow matching.

    Raises: ValueError if it is made for something else.
    """
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    if config["_class_name"] == "FlowMatchEulerDiscreteScheduler":
        return Schedule(kind="flow", shift=config.get("shift", 1.0))
    if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction":
        raise ValueError(f"its {config['_class_name']} is not made for flow matching")
    return Schedule(kind="flow", spacing="thousandths", shift=config.get("flow_shift", 1.0))


def _encode_prompt(folder: Path, prompt: str, *, device: str) -> Tensor:
    """Embed a prompt with the folder's UMT5, zeros behind it. Shapes: result [1, L, D]."""
    prompt = " ".join(prompt.split())
    embedded, mask = encode_text(
        folder, prompt, length=PROMPT_TOKENS, is_masked=True, device=device
    )
    return embedded * mask[..., None]
