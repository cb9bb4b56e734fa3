"""TAEHV: tiny autoencoders for the latents of large video models, read from their files.

The layers and their names are those of `autoencoder`; the decoder is wider than the encoder. What
differs is around them: pixels are in [0, 1]; and it is the last frame that is repeated, not the
first, so that a latent frame sees up to time_factor - 1 frames beyond its own. Latents are those
of the denoiser, without mean and deviation.
Axes: B batch, C channels, T frames, H W pixels, F latent frames, h w latent grid.
Source: Boer Bohan 2025, github.com/madebyollin/taehv (taehv.py and README at 1f14a56); how its
weights are trained, github.com/madebyollin/seraena (TAEHV_Training_Example).
"""

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .autoencoder import AutoencoderConfig, TinyVideoAutoencoder
from .errors import ModelError
from .spec import Geometry

SOURCE = "github.com/madebyollin/taehv"
SPACE, BLOCKS = (2, 2, 2), (0, 3, 3, 3)
# Places of the layers whose shapes tell the sizes, from pixels to latents.
POOLED, GROWN = (0, 3, 8, 13), (20, 14, 8, 1)
TIMES = (19, 13, 7)


@dataclass(frozen=True, kw_only=True)
class TinyFile:
    """The published weights for a family's latents.

    name: what their file is called, without ending. encodes: whether their encoder stands in for
    the family's own too. keeps_even: whether an even number of latent frames gives all of their
    frames, the first latent frame being no image alone.
    """

    name: str
    encodes: bool
    keeps_even: bool = False


class Taehv(TinyVideoAutoencoder):
    """A tiny autoencoder between pixels in [-1, 1], as bases have them, and a model's latents."""

    def __init__(
        self,
        config: AutoencoderConfig,
        *,
        decoder_widths: tuple[int, ...],
        has_encoder: bool,
        keeps_even: bool,
    ) -> None:
        super().__init__(config, decoder_widths=decoder_widths)
        self.has_encoder, self.keeps_even = has_encoder, keeps_even
        if not has_encoder:
            self.encoder = nn.Sequential()

    def encode(self, video: Tensor) -> Tensor:
        """Encode a video.

        Shapes: video [B, 3, T, H, W], T = 1 + k x time_factor; result [B, C, 1 + k, h, w].
        """
        video = video / 2 + 0.5
        if video.shape[2] == 1:
            return self._encode_image(video[:, :, 0])[:, :, None]
        rest = video[:, :, -1:].expand(-1, -1, self.config.time_factor - 1, -1, -1)
        return self._encode(torch.cat([video, rest], dim=2).transpose(1, 2)).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode all frames. Shapes: [B, C, F, h, w] -> [B, 3, T, H, W]."""
        if self.keeps_even and latents.shape[2] % 2 == 0:
            return self._decode(latents)
        return super().decode(latents)

    def decode_last(self, latents: Tensor) -> Tensor:
        """Decode the last frame. Shapes: [B, C, F, h, w] -> [B, 3, H, W]."""
        return super().decode_last(latents).clamp(0, 1) * 2 - 1

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents).clamp(0, 1) * 2 - 1


def read_taehv(path: Path, file: TinyFile, geometry: Geometry) -> Taehv:
    """Read weights in TAEHV's layout, in fp32, for the latents of a base.

    The encoder is left out where it does not serve, or the file has none. Different models' files
    have the same shapes, so that only the name of a file tells whose it is: one that is called
    like another model's is refused.
    Raises: ModelError if the file is missing or damaged, or made for another model.
    """
    advice = f"Take {file.name}.pth or {file.name}.safetensors from {SOURCE}."
    if not path.is_file():
        raise ModelError(f"there is no file {path}. {advice}")
    if "tae" in path.stem and not path.stem.startswith(file.name):
        raise ModelError(f"{path.name} is made for the latents of another model. {advice}")
    try:
        weights = _read(path)
        has_encoder = file.encodes and "encoder.0.weight" in weights
        config, decoder_widths = _sizes(weights, has_encoder=has_encoder)
        _require(config, geometry)
        tiny = Taehv(
            config,
            decoder_widths=decoder_widths,
            has_encoder=has_encoder,
            keeps_even=file.keeps_even,
        )
        parts = ("encoder.", "decoder.") if has_encoder else ("decoder.",)
        tiny.load_state_dict({n: v for n, v in weights.items() if n.startswith(parts)})
    except KeyError as error:
        raise ModelError(
            f"{path} is no tiny autoencoder in TAEHV's layout: there is no {error}. {advice}"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path} does not fit ({error}). {advice}") from error
    return tiny


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        found: object = load_file(path)
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError("it holds no weights") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError("it holds something else than weights by name")
    return {name: value.float() for name, value in found.items()}


def _sizes(
    weights: Mapping[str, Tensor], *, has_encoder: bool
) -> tuple[AutoencoderConfig, tuple[int, ...]]:
    """Give the configuration and the decoder's widths that weights are made for.

    Raises: KeyError if a layer is missing.
    """
    grown = tuple(weights[f"decoder.{place}.weight"].shape[0] for place in GROWN)
    pooled = tuple(weights[f"encoder.{place}.weight"].shape[0] for place in POOLED * has_encoder)
    times = [weights[f"decoder.{place}.conv.weight"].shape for place in TIMES]
    config = AutoencoderConfig(
        latent_channels=weights["decoder.1.weight"].shape[1],
        patch=math.isqrt(weights["decoder.22.weight"].shape[0] // 3),
        space=SPACE,
        time=tuple(shape[0] // shape[1] for shape in times),
        widths=pooled or grown,
        blocks=BLOCKS,
        has_shortcut=False,
    )
    return config, grown


def _require(config: AutoencoderConfig, geometry: Geometry) -> None:
    """Require that latents are as large as a base's.

    Raises: ValueError if they are not.
    """
    found = (config.latent_channels, config.space_factor, config.time_factor)
    wanted = (geometry.channels, geometry.space_factor, geometry.time_factor)
    if found != wanted:
        made, needed = (
            f"{c} channels for {s} x {s} pixels, {t} frames" for c, s, t in (found, wanted)
        )
        raise ValueError(f"its latents have {made}, those of the base {needed}")
