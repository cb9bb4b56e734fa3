"""CogVideoX and CogVideoX1.5, image to video, from a folder in diffusers' layout.

v-prediction over the latents of a causal 3D autoencoder. The first frame enters as channels beside
the first latent frame, zeros beside the others. CogVideoX1.5 merges its latent frames in pairs
(`patch_size_t`), so that an odd number of them gets one more in front, a copy of the first, which
is dropped again before decoding; it scales the latents of the first frame the other way round.
Axes: B batch, C channels, T frames, H W pixels, F latent frames, h w latent grid, L tokens, D
width.
Source: Yang et al. 2024 (CogVideoX); the details are those of diffusers' pipeline.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from ..checkpoints import digest_folder, read_network
from ..errors import ModelError
from ..pipeline_base import Denoiser, PipelineBase
from ..schedule import Schedule
from ..spec import Geometry
from ..taehv import TinyFile
from ..text import encode_text
from ..train_config import Suited
from ..transition import Transition

PIPELINES = ("CogVideoXImageToVideoPipeline",)
OFS = 2.0  # what the frame-rate embedding of CogVideoX1.5 is given, always
# Height and width in pixels: what is larger goes through the autoencoder in tiles that overlap and
# are blended, as in CogVideoX's own demo; whole, 9 frames of 1360x768 would take 36 GB.
TILE = (480, 720)
SHORTEST = (9, 5)  # frames: the paper's, and the fewest
# Those of ComfyUI itself since 2026 (comfy/ldm/cogvideo/model.py). The older
# ComfyUI-CogVideoXWrapper takes the file for diffusers instead.
COMFY_NAMES = {
    "transformer_blocks": "blocks",
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
}


class CogVideoXDenoiser(Denoiser):
    """The transformer behind the one layout that all bases share."""

    def __init__(self, transformer: CogVideoXTransformer3DModel, *, steps: int) -> None:
        super().__init__()
        self.transformer, self.steps, self.dtype = transformer, steps, transformer.dtype

    def forward(self, noisy: Tensor, time: Tensor, first: Tensor, prompt: Tensor) -> Tensor:
        """Predict a noise - b clean.

        Shapes: noisy, result [B, C, F, h, w]; time [B] in (0, 1]; first [B, C, 1, h, w];
        prompt [1, L, D].
        """
        config, kind = self.transformer.config, self.dtype
        known = torch.cat([first, torch.zeros_like(noisy[:, :, 1:])], dim=2)
        # The grid of times is 1/N ... 1, as steps 0 ... N - 1.
        step = (time * self.steps).round() - 1
        prediction: Tensor = self.transformer(
            hidden_states=torch.cat([noisy, known], dim=1).transpose(1, 2).to(kind),
            encoder_hidden_states=prompt.expand(noisy.shape[0], -1, -1).to(kind),
            timestep=step,
            ofs=None if config.ofs_embed_dim is None else noisy.new_full((1,), OFS).to(kind),
            image_rotary_emb=self._rotary(noisy),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).to(noisy.dtype)

    def _rotary(self, noisy: Tensor) -> tuple[Tensor, Tensor] | None:
        config = self.transformer.config
        if not config.use_rotary_positional_embeddings:
            return None
        frames, height, width = noisy.shape[2:]
        frames = -(-frames // (config.patch_size_t or 1))
        grid = (height // config.patch_size, width // config.patch_size)
        base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        options: dict[str, Any] = {"crops_coords": _crop(grid, base)}
        if config.patch_size_t is not None:
            options = {"crops_coords": None, "grid_type": "slice"}
            # How far the table of angles goes: larger pictures than in pretraining need more.
            options["max_size"] = tuple(max(pair) for pair in zip(base, grid, strict=True))
        cos, sin = get_3d_rotary_pos_embed(
            config.attention_head_dim,
            grid_size=grid,
            temporal_size=self.places(frames)[-1] + 1,
            device=noisy.device,
            **options,
        )
        if self.last_place is None:
            return cos, sin
        return self.pick(cos, frames, axis=0), self.pick(sin, frames, axis=0)


class CogVideoXBase(PipelineBase[CogVideoXDenoiser]):
    """A frozen CogVideoX; see `fewshot_rt.base.Base`."""

    # Acuaviva et al. 2025 (all of these).
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    suited = Suited(batch=2, rate=1e-4, rank=64, alpha=32, clip=1.0, checkpointing=True)
    transition = Transition(kind="discrete", frames=9)
    comfy_names: Mapping[str, str] | None = COMFY_NAMES
    # Its encoder takes frames in fours from the very first, which CogVideoX has alone.
    tiny_file = TinyFile(name="taecvx", encodes=False, keeps_even=True)

    def __init__(
        self,
        *,
        transformer: CogVideoXTransformer3DModel,
        autoencoder: AutoencoderKLCogVideoX,
        schedule: Schedule,
        encode_prompt: Callable[[str], Tensor],
        name: str,
        revision: str,
        device: str | None = None,
    ) -> None:
        autoencoder.enable_tiling(*TILE)
        config, scales = transformer.config, autoencoder.config
        space = 2 ** (len(scales.block_out_channels) - 1)
        time_factor = scales.temporal_compression_ratio
        self.geometry = Geometry(
            channels=config.out_channels,
            time_factor=int(time_factor),
            space_factor=space,
            multiple=space * config.patch_size,
            native=(config.sample_height * space, config.sample_width * space),
            frames=SHORTEST,
            merged_frames=config.patch_size_t or 1,
            is_fixed=config.use_learned_positional_embeddings,
        )
        super().__init__(
            denoiser=CogVideoXDenoiser(transformer, steps=len(schedule.signal_power)),
            others={"autoencoder": autoencoder},
            encode_prompt=encode_prompt,
            schedule=schedule,
            name=name,
            revision=revision,
            device=device,
        )

    def _encode(self, video: Tensor) -> Tensor:
        latents = self._latents(video) * self.autoencoder.config.scaling_factor
        missing = -latents.shape[2] % self.geometry.merged_frames
        return torch.cat([latents[:, :, :1].expand(-1, -1, missing, -1, -1), latents], dim=2)

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode all frames, as the official pipeline does: 5 frames come back as 8.

        The autoencoder makes one frame of the first latent frame only where their number is odd.
        """
        video: Tensor = self.autoencoder.decode(self._typed(self._for_tiny(latents))).sample
        return video.float()

    def _for_tiny(self, latents: Tensor) -> Tensor:
        """Give latents as both autoencoders take them, TAEHV's too: unscaled (TAECVX_T2I_Demo)."""
        extra = self.geometry.extra_frames(latents.shape[2])
        unscaled: Tensor = latents[:, :, extra:] / self.autoencoder.config.scaling_factor
        return unscaled

    def condition(self, image: Tensor, *, frames: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Encode the first frame. Shapes: image [B, 3, H, W]; first [B, C, 1, h, w]."""
        config = self.autoencoder.config
        scale = config.scaling_factor
        # CogVideoX1.5 was trained with the inverse by mistake, and wants it.
        scale = 1 / scale if config.invert_scale_latents else scale
        return {"first": self._latents(image[:, :, None]) * scale}

    def _latents(self, video: Tensor) -> Tensor:
        """Give the mean of the autoencoder's distribution, unscaled."""
        latents: Tensor = self.autoencoder.encode(self._typed(video)).latent_dist.mode()
        return latents.float()


def open_base(name: str, *, device: str = "cpu", weights: str = "auto") -> CogVideoXBase:
    """Open a folder with a CogVideoX image-to-video pipeline. weights: see `read_network`.

    Raises: ModelError if a file is missing or damaged, or the scheduler is of another kind.
    """
    folder = Path(name)
    try:
        transformer = read_network(
            CogVideoXTransformer3DModel, folder / "transformer", device=device, weights=weights
        )
        autoencoder = read_network(
            AutoencoderKLCogVideoX, folder / "vae", device=device, weights="auto"
        )
        schedule = _schedule(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the base in {folder} cannot be read ({error}). Download all of its files again."
        ) from error
    return CogVideoXBase(
        transformer=transformer,
        autoencoder=autoencoder,
        schedule=schedule,
        encode_prompt=lambda prompt: encode_text(
            folder,
            prompt,
            length=transformer.config.max_text_seq_length,
            is_masked=False,
            device=device,
        )[0],
        name=folder.resolve().name,
        revision=digest_folder(folder),
        device=device,
    )


def _schedule(folder: Path) -> Schedule:
    """Read the schedule of a pipeline's scheduler.

    Raises: ValueError if it is no v-prediction with trailing times that begins at pure noise.
    """
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    wanted = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    for key, value in wanted.items():
        if config.get(key) != value:
            raise ValueError(f"the scheduler's {key} is {config.get(key)!r}, not {value!r}")
    # The DPM scheduler that some folders name has the same table of noise.
    powers = CogVideoXDDIMScheduler.from_config(config).alphas_cumprod.double().tolist()
    return Schedule(kind="v", signal_power=tuple(powers))


def _crop(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Fit a grid of patches into the one of pretraining, centred: top left and bottom right.

    The rotary angles of CogVideoX (not 1.5) are stretched over this window.
    Source: diffusers' pipeline, which takes the rule from HunyuanDiT.
    """
    height, width = grid
    if height / width > base[0] / base[1]:
        fitted = (base[0], round(base[0] / height * width))
    else:
        fitted = (round(base[1] / width * height), base[1])
    top, left = (round((whole - part) / 2) for whole, part in zip(base, fitted, strict=True))
    return (top, left), (top + fitted[0], left + fitted[1])
