"""pocket: the small video model in the box, of the Wan family.

The first latent frame is known: it enters as channels beside each of the later frames, and only
these are denoised, by flow matching. Beside a clean first frame among the tokens (Wan TI2V), this
halves the tokens of a short video and learns faster (CONTRIBUTING.md has the figures). Waves over
the picture enter as channels, too: rotary embeddings tell tokens only how far apart they are, and
what is mirrored, turned or cut up goes by where it is.
Axes: B batch, C channels, T frames, H W pixels, F latent frames, h w latent grid, L tokens, D
width, P waves.
"""

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..autoencoder import AutoencoderConfig, TinyVideoAutoencoder
from ..errors import ConfigError, ModelError
from ..schedule import Schedule
from ..spec import Geometry
from ..train_config import Suited
from ..transition import Transition

WEIGHTS = Path(__file__).parent.parent / "weights" / "pocket"
WEIGHT_FILE = "diffusion_pytorch_model.safetensors"
PIPELINES = ()  # its folders name none
TIME_SCALE = 1000  # the transformer counts time from 0 to 1000
PROMPT_WORDS = 4  # tokens of a prompt
PATCHES = "patch_embedding.weight"
WAVE_WEIGHT = 0.15
TRANSFORMER: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": 40,  # a noisy frame, the first one, and 16 waves
    "out_channels": 12,
    "text_dim": 64,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}


class PocketDenoiser(nn.Module):
    """The transformer behind the one layout that all bases share.

    It takes as many waves as it has channels for, besides two frames; none is possible.
    """

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.waves = transformer.config.in_channels - 2 * transformer.config.out_channels

    def forward(self, noisy: Tensor, time: Tensor, first: Tensor, prompt: Tensor) -> Tensor:
        """Predict noise - clean. The first frame's prediction leads exactly to `first`.

        Shapes: noisy, result [B, C, F, h, w]; time [B] in (0, 1]; first [B, C, 1, h, w];
        prompt [1, L, D].
        """
        later = noisy[:, :, 1:]
        seen = [later, first.expand_as(later)]
        if self.waves:
            waves = make_waves(self.waves, (later.shape[-2], later.shape[-1]), device=later.device)
            seen.append(waves[:, :, None].expand(later.shape[0], -1, later.shape[2], -1, -1))
        prediction = self.transformer(
            hidden_states=torch.cat(seen, dim=1),
            timestep=time * TIME_SCALE,
            encoder_hidden_states=prompt.expand(noisy.shape[0], -1, -1),
            return_dict=False,
        )[0]
        towards_first = (noisy[:, :, :1] - first) / time[:, None, None, None, None]
        return torch.cat([towards_first, prediction], dim=2)


@torch.no_grad()
def draw_wave_weights(transformer: WanTransformer3DModel) -> None:
    """Draw the first weights of the waves, if there are any, large enough to be noticed.

    From zero they grew too slowly for attention to go by places.
    """
    waves = PocketDenoiser(transformer).waves
    if waves:
        transformer.get_parameter(PATCHES)[:, -waves:].normal_(std=WAVE_WEIGHT)


def make_waves(count: int, size: tuple[int, int], *, device: torch.device) -> Tensor:
    """Make sines and cosines along both sides of a picture: half a period, and octaves of it.

    Shapes: size (h, w); result [1, P, h, w], P = count, a multiple of 4.
    Source: Vaswani et al. 2017, sec. 3.5, along two axes.
    """
    lines = [(torch.arange(side, device=device) + 0.5) / side * 2 - 1 for side in size]
    down, across = torch.meshgrid(*lines, indexing="ij")
    angles = [math.pi / 2 * 2**k * line for k in range(count // 4) for line in (down, across)]
    waves = [wave[None, None] for angle in angles for wave in (angle.sin(), angle.cos())]
    return torch.cat(waves, dim=1)


@dataclass(frozen=True)
class PromptTable:
    """Words that the model was pretrained with, and their embeddings; word 0 says nothing.

    Shapes: embeddings [words, D].
    """

    words: tuple[str, ...]
    embeddings: Tensor

    def ids(self, prompt: str) -> list[int]:
        """Give the numbers of the known words of a prompt, over and over; word 0 if there are none.

        One word among silent ones would be a weak sign.
        """
        known = [self.words.index(w) for w in prompt.lower().split() if w in self.words]
        return ((known or [0]) * PROMPT_WORDS)[:PROMPT_WORDS]

    def embed(self, prompt: str) -> Tensor:
        """Embed a prompt; unknown words say nothing. Shapes: result [1, L, D]."""
        return self.embeddings[self.ids(prompt)][None]


class PocketBase:
    """A frozen pocket model; see `fewshot_rt.base.Base`."""

    # With the layers into and out of the latents, what goes to other places is learned much sooner.
    exact_roles: tuple[str, ...] = ()
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
        *("patch_embedding", "proj_out"),
    )
    batch = 4
    tiny_roles = ("encoder", "decoder")
    suited = Suited(batch=4, rate=0.004, rank=32, alpha=32, clip=1.0, checkpointing=False)
    transition = Transition(kind="repeat_target", frames=5)
    comfy_names: Mapping[str, str] | None = None

    def __init__(
        self,
        *,
        transformer: WanTransformer3DModel,
        autoencoder: TinyVideoAutoencoder,
        prompts: PromptTable,
        index: dict[str, Any],
    ) -> None:
        self.name: str = index["name"]
        self.revision: str = index["revision"]
        self.index = index
        self.schedule = Schedule(kind="flow")
        self.prompts = prompts
        self.autoencoder = autoencoder
        config = autoencoder.config
        self.geometry = Geometry(
            channels=config.latent_channels,
            time_factor=config.time_factor,
            space_factor=config.space_factor,
            multiple=2 * config.space_factor,
            native=tuple(index["native"]),
            frames=(5, 9),
            known_frames=1,
        )
        self._denoiser = PocketDenoiser(transformer)
        for module in (autoencoder, self._denoiser):
            module.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._denoiser.parameters()).device

    def networks(self) -> dict[str, nn.Module]:
        """Give the autoencoder, by name."""
        return {"autoencoder": self.autoencoder}

    def rest(self) -> None:
        """Do nothing: the autoencoder is small."""

    def play(self, transition: Transition) -> None:
        """Place frames in time: always in their own places.

        Raises: ModelError if the transition spans more.
        """
        if transition.span is not None:
            raise ModelError(
                "pocket knows no places in time but those of its frames: leave out --drop-after, "
                "and span in the transition of task.toml."
            )

    def offloaded(self) -> AbstractContextManager[None]:
        """Keep the denoiser where it is.

        Raises: ModelError always: it is small.
        """
        raise ModelError("pocket is small enough for any device. Leave out --offload.")

    def embed(self, prompt: str) -> dict[str, Tensor]:
        """Embed a prompt. Shapes: prompt [1, L, D]."""
        return {"prompt": self.prompts.embed(prompt)}

    def encode(self, video: Tensor) -> Tensor:
        """Encode a video. Shapes: [B, 3, T, H, W] -> [B, C, F, h, w]."""
        return self.autoencoder.encode(video)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode all frames. Shapes: [B, C, F, h, w] -> [B, 3, T, H, W]."""
        return self.autoencoder.decode(latents)

    def decode_last(self, latents: Tensor) -> Tensor:
        """Decode only the last frame. Shapes: [B, C, F, h, w] -> [B, 3, H, W]."""
        return self.autoencoder.decode_last(latents)

    def condition(self, image: Tensor, *, frames: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Encode the first frame. Shapes: image [B, 3, H, W]; first [B, C, 1, h, w]."""
        return {"first": self.autoencoder.encode(image[:, :, None])}

    def denoiser(self) -> PocketDenoiser:
        """Give the module that predicts; the same at every call."""
        return self._denoiser


def open_base(name: str, *, device: str = "cpu", weights: str = "auto") -> PocketBase:
    """Open pocket, or a folder in its layout.

    Raises: ModelError if a file is missing or damaged; ConfigError if its weights are to be kept
    in another way than fp32.
    """
    if weights not in ("auto", "fp32"):
        raise ConfigError(f"{name} is small and keeps its weights in fp32, not {weights}.")
    folder = WEIGHTS if name == "pocket" else Path(name)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        config = AutoencoderConfig.from_dict(_config(folder / "vae"))
        autoencoder = TinyVideoAutoencoder(config)
        autoencoder.load_state_dict(_weights(folder / "vae"))
        transformer = WanTransformer3DModel.from_config(_config(folder / "transformer"))
        transformer.load_state_dict(_weights(folder / "transformer"))
        if PocketDenoiser(transformer).waves % 4:
            raise ValueError("its channels beside two frames are no multiple of 4")
        words = tuple(json.loads((folder / "prompt" / "words.json").read_text(encoding="utf-8")))
        table = load_file(folder / "prompt" / "embeddings.safetensors")["embeddings"].float()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the base in {folder} cannot be read ({error}). Reinstall fewshot-rt, or make a base "
            "with `fewshot-rt pretrain`."
        ) from error
    return PocketBase(
        transformer=transformer.to(device),
        autoencoder=autoencoder.to(device),
        prompts=PromptTable(words, table.to(device)),
        index=index,
    )


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(folder / WEIGHT_FILE).items()}
