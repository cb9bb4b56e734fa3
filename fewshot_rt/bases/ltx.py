"""LTX-Video 2B and 13B, image to video, from a folder in diffusers' layout.

Flow matching over the latents of an autoencoder that makes one token of 32 x 32 pixels and 8
frames. The first latent frame is known: it stays clean among the tokens, at time 0, while the
later ones are denoised. Two generations, told apart by their scheduler:
- before 0.9.5, frames lie evenly, and sampling times are shifted by the size of the video;
- from 0.9.5 on and in 13B, the first latent frame counts as the one frame of pixels that it is,
  and sampling times are linear, then quadratic. The official pipeline also disturbs the first
  frame with random noise (`image_cond_noise_scale`, 0.15); here it stays clean, as with 0 there.
Axes: B batch, C channels, T frames, H W pixels, F latent frames, h w latent grid, L tokens, D
width.
Source: HaCohen et al. 2024 (LTX-Video); the details are those of diffusers' pipelines.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
)
from torch import Tensor

from ..checkpoints import digest_folder, read_network, read_pipeline
from ..errors import ModelError
from ..pipeline_base import Denoiser, PipelineBase
from ..schedule import Schedule
from ..spec import Geometry
from ..text import encode_text
from ..train_config import Suited
from ..transition import Transition

PIPELINES = ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline")
TIME_SCALE = 1000  # the transformer counts time from 0 to 1000
# What the official pipelines take if nothing else is given.
FRAME_RATE = 25
PROMPT_TOKENS, CAUSAL_PROMPT_TOKENS = 128, 256
EXAMPLE_SIZE = (480, 704)  # in the examples of the official pipelines
SHORTEST = (9,)  # two latent frames: the known one, and one to be made
# ComfyUI has the names of LTX-Video's own code (comfy/ldm/lightricks/model.py), which are those of
# diffusers but for these, none of them layers of adapters.
COMFY_NAMES = {
    "proj_in": "patchify_proj",
    "time_embed": "adaln_single",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}


class LTXDenoiser(Denoiser):
    """The transformer behind the one layout that all bases share.

    is_causal: whether the first latent frame counts as one frame of pixels, as from 0.9.5 on.
    """

    def __init__(
        self,
        transformer: LTXVideoTransformer3DModel,
        *,
        time_factor: int,
        space_factor: int,
        is_causal: bool,
    ) -> None:
        super().__init__()
        self.transformer, self.is_causal, self.dtype = transformer, is_causal, transformer.dtype
        self.time_factor, self.space_factor = time_factor, space_factor

    def forward(self, noisy: Tensor, time: Tensor, first: Tensor, prompt: Tensor) -> Tensor:
        """Predict noise - clean. The first frame's prediction leads exactly to `first`.

        Shapes: noisy, result [B, C, F, h, w]; time [B] in (0, 1]; first [B, C, 1, h, w];
        prompt [1, L, D].
        """
        batch, grid = noisy.shape[0], noisy.shape[2:]
        seen = torch.cat([first, noisy[:, :, 1:]], dim=2)
        moments = time[:, None, None, None].expand(-1, *grid) * TIME_SCALE
        moments = torch.cat([torch.zeros_like(moments[:, :1]), moments[:, 1:]], dim=1)
        tokens = self.transformer(
            hidden_states=seen.flatten(2).transpose(1, 2).to(self.dtype),
            encoder_hidden_states=prompt.expand(batch, -1, -1).to(self.dtype),
            timestep=moments.flatten(1),
            encoder_attention_mask=None,
            video_coords=self._places(noisy),
            return_dict=False,
        )[0]
        prediction = tokens.transpose(1, 2).unflatten(2, grid).to(noisy.dtype)
        towards_first = (noisy[:, :, :1] - first) / time[:, None, None, None, None]
        return torch.cat([towards_first, prediction[:, :, 1:]], dim=2)

    def _places(self, noisy: Tensor) -> Tensor:
        """Give the place of each token: seconds, and pixels down and across. Shapes: [1, 3, L]."""
        frames, height, width = noisy.shape[2:]
        rest = (torch.arange(size, device=noisy.device) for size in (height, width))
        lines = (self.line(frames, noisy.device), *rest)
        frame, down, across = torch.meshgrid(*(line.float() for line in lines), indexing="ij")
        # Computed in the order of the pipelines: the fastest rotations show the last bit.
        if self.is_causal:
            shown = (frame * self.time_factor + 1 - self.time_factor).clamp(min=0)
            seconds = shown * (1 / FRAME_RATE)
        else:
            seconds = frame * (self.time_factor / FRAME_RATE)
        places = [seconds, down * self.space_factor, across * self.space_factor]
        return torch.stack(places).flatten(1)[None]


class LTXBase(PipelineBase[LTXDenoiser]):
    """A frozen LTX-Video; see `fewshot_rt.base.Base`."""

    # Acuaviva et al. 2025; for 13B, too, where their batch is 2 x 2 accumulated.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    suited = Suited(batch=4, rate=2e-4, rank=64, alpha=64, clip=1.0, checkpointing=True)
    transition = Transition(kind="discrete", frames=9)
    # The latents of TAEHV's taeltx files are those of LTX-2, with as many channels but another
    # autoencoder: none of its files fits.
    tiny_file = None
    comfy_names: Mapping[str, str] | None = COMFY_NAMES

    def __init__(
        self,
        *,
        transformer: LTXVideoTransformer3DModel,
        autoencoder: AutoencoderKLLTXVideo,
        schedule: Schedule,
        encode_prompt: Callable[[str], Tensor],
        is_causal: bool,
        name: str,
        revision: str,
        device: str | None = None,
    ) -> None:
        self.geometry = Geometry(
            channels=autoencoder.config.latent_channels,
            time_factor=autoencoder.temporal_compression_ratio,
            space_factor=autoencoder.spatial_compression_ratio,
            multiple=autoencoder.spatial_compression_ratio,
            native=EXAMPLE_SIZE,
            frames=SHORTEST,
            known_frames=1,
        )
        denoiser = LTXDenoiser(
            transformer,
            time_factor=self.geometry.time_factor,
            space_factor=self.geometry.space_factor,
            is_causal=is_causal,
        )
        super().__init__(
            denoiser=denoiser,
            others={"autoencoder": autoencoder},
            encode_prompt=encode_prompt,
            schedule=schedule,
            name=name,
            revision=revision,
            device=device,
        )

    def _encode(self, video: Tensor) -> Tensor:
        mean, std = self._moments()
        latents: Tensor = self.autoencoder.encode(self._typed(video)).latent_dist.mode()
        return (latents.float() - mean) / std

    def _decode(self, latents: Tensor) -> Tensor:
        mean, std = self._moments()
        config = self.autoencoder.config
        # The scaling factor counts in this direction only, as in the pipelines; it is 1.
        scaled = latents * std / config.scaling_factor + mean
        # Some decoders can take away a last bit of noise; at time 0 there is none.
        time = latents.new_zeros(latents.shape[0]) if config.timestep_conditioning else None
        time = None if time is None else self._typed(time)
        video: Tensor = self.autoencoder.decode(self._typed(scaled), time).sample
        return video.float()

    def condition(self, image: Tensor, *, frames: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Encode the first frame. Shapes: image [B, 3, H, W]; first [B, C, 1, h, w]."""
        return {"first": self.encode(image[:, :, None])}

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Give mean and standard deviation of the latents. Shapes: [C, 1, 1, 1]."""
        mean, std = self.autoencoder.latents_mean.float(), self.autoencoder.latents_std.float()
        return mean[:, None, None, None], std[:, None, None, None]


def open_base(name: str, *, device: str = "cpu", weights: str = "auto") -> LTXBase:
    """Open a folder with an LTX-Video pipeline. weights: see `read_network`.

    Raises: ModelError if a file is missing or damaged, the scheduler is of another kind, or the
    decoder adds noise of its own (0.9.1).
    """
    folder = Path(name)
    try:
        transformer = read_network(
            LTXVideoTransformer3DModel, folder / "transformer", device=device, weights=weights
        )
        _require("transformer", transformer.config, {"patch_size": 1, "patch_size_t": 1})
        autoencoder = read_network(
            AutoencoderKLLTXVideo, folder / "vae", device=device, weights="auto"
        )
        schedule, is_causal = _schedule(folder)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ArithmeticError) as error:
        raise ModelError(
            f"the base in {folder} cannot be read ({error}). Download all of its files again."
        ) from error
    if any(autoencoder.config.decoder_inject_noise):
        raise ModelError(
            f"the decoder in {folder} adds random noise, as that of LTX-Video 0.9.1 does, and no "
            "answer could be had twice. Use another version."
        )
    return LTXBase(
        transformer=transformer,
        autoencoder=autoencoder,
        schedule=schedule,
        encode_prompt=lambda prompt: _encode_prompt(
            folder, prompt, is_causal=is_causal, device=device
        ),
        is_causal=is_causal,
        name=folder.resolve().name,
        revision=digest_folder(folder),
        device=device,
    )


def _schedule(folder: Path) -> tuple[Schedule, bool]:
    """Read the schedule of a pipeline's scheduler, and whether it is of 0.9.5 or later.

    The name of the pipeline does not tell: diffusers' own script writes 0.9.5 as an `LTXPipeline`.
    Raises: ValueError if the scheduler is of neither generation.
    """
    given = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    config = {"_class_name": None} | dict(FlowMatchEulerDiscreteScheduler().config) | given
    wanted: dict[str, Any] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": TIME_SCALE,
        "invert_sigmas": False,
        "stochastic_sampling": False,
    }
    wanted |= {f"use_{kind}_sigmas": False for kind in ("karras", "exponential", "beta")}
    is_causal = not config["use_dynamic_shifting"]
    if is_causal or read_pipeline(folder) == "LTXConditionPipeline":
        wanted |= {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
    else:
        wanted["time_shift_type"] = "exponential"
    _require("scheduler", config, wanted)
    if is_causal:
        return Schedule(kind="flow", spacing="linear_quadratic"), True
    tokens = config["max_image_seq_len"] - config["base_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / tokens
    growth = (slope, config["base_shift"] - slope * config["base_image_seq_len"])
    return Schedule(kind="flow", growth=growth, last=config["shift_terminal"] or 0.0), False


def _encode_prompt(folder: Path, prompt: str, *, is_causal: bool, device: str) -> Tensor:
    """Embed a prompt with the folder's T5, and leave out the padding. Shapes: result [1, L, D].

    The official pipelines keep it and mask it in the transformer, with the same outcome.
    """
    length = CAUSAL_PROMPT_TOKENS if is_causal else PROMPT_TOKENS
    embedded, mask = encode_text(folder, prompt, length=length, is_masked=is_causal, device=device)
    return embedded[:, mask[0] > 0]


def _require(part: str, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Require values of a configuration.

    Raises: ValueError that names the first that differs.
    """
    for key, value in wanted.items():
        if config[key] != value:
            raise ValueError(f"the {part}'s {key} is {config[key]!r}, not {value!r}")
