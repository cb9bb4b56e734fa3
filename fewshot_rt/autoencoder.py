"""The tiny video autoencoder: frame-wise convolutions and a one-frame memory, causal in time.

The block layout (memory blocks, time pooling and growing) is that of TAEHV, Boer Bohan 2024.
Axes: B batch, T frames, H W pixels, F latent frames, C channels, h w latent grid; N = B x frames.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .autoencoder_layers import (
    Memory,
    SoftClamp,
    TimeGrow,
    TimePool,
    conv,
    run_all,
    run_needed,
    sum_alike,
)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of a tiny video autoencoder.

    patch: pixels a side folded into channels before anything else. space, time: the factor of each
    level from pixels to latents. widths: channels of each level, and of the layer before them.
    blocks: memory blocks in each level. has_shortcut: a linear map beside the layers, so that they
    only learn what principal components leave (as in Chen et al. 2025, DC-AE, sec. 3.2).
    """

    latent_channels: int = 12
    patch: int = 2
    space: tuple[int, ...] = (2, 1)
    time: tuple[int, ...] = (2, 2)
    widths: tuple[int, ...] = (32, 64, 64)
    blocks: tuple[int, ...] = (0, 2, 2)
    has_shortcut: bool = True
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @property
    def space_factor(self) -> int:
        """Pixels a side of one latent cell."""
        factor = self.patch
        for stride in self.space:
            factor *= stride
        return factor

    @property
    def time_factor(self) -> int:
        """Frames of one latent frame."""
        factor = 1
        for stride in self.time:
            factor *= stride
        return factor

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AutoencoderConfig":
        """Make a configuration from its JSON."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fields)


class TinyVideoAutoencoder(nn.Module):
    """Encode 1 + k x time_factor frames to 1 + k latent frames, and back.

    The first frame is repeated to fill its latent frame, so a video's first latent frame is that of
    its first image alone. decoder_widths: those of the decoder, where they are others.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: AutoencoderConfig, *, decoder_widths: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(replace(config, widths=decoder_widths or config.widths))
        if config.has_shortcut:
            pixels = 3 * config.space_factor**2 * config.time_factor
            self.shortcut_in = nn.Conv2d(pixels, config.latent_channels, 1)
            self.shortcut_out = nn.Conv2d(config.latent_channels, pixels, 1)
        mean = config.latents_mean or (0.0,) * config.latent_channels
        std = config.latents_std or (1.0,) * config.latent_channels
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def encode(self, video: Tensor) -> Tensor:
        """Encode a video to normalised latents.

        Shapes: video [B, 3, T, H, W], T = 1 + k x time_factor; result [B, C, 1 + k, h, w].
        """
        if video.shape[2] == 1:
            latents = self._encode_image(video[:, :, 0])[:, None]
        else:
            lead = video[:, :, :1].expand(-1, -1, self.config.time_factor - 1, -1, -1)
            latents = self._encode(torch.cat([lead, video], dim=2).transpose(1, 2))
        return ((latents - self.mean) / self.std).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode all frames. Shapes: [B, C, F, h, w] -> [B, 3, T, H, W]."""
        return self._decode(latents)[:, :, self.config.time_factor - 1 :]

    def decode_last(self, latents: Tensor) -> Tensor:
        """Decode the last frame, computing only what it needs; equal to `decode(...)[:, :, -1]`.

        Shapes: latents [B, C, F, h, w]; result [B, 3, H, W].
        """
        frames = [frame * self.std + self.mean for frame in latents.unbind(2)]
        pixels = functional.pixel_shuffle(run_needed(self.decoder, frames), self.config.patch)
        if self.config.has_shortcut:
            weight, bias = self.shortcut_out.weight, self.shortcut_out.bias
            assert bias is not None
            last = -(len(weight) // self.config.time_factor)  # the channels of the last frame
            cells = functional.conv2d(frames[-1], weight[last:], bias[last:])
            pixels = pixels + functional.pixel_shuffle(cells, self.config.space_factor)
        return pixels

    def _encode(self, video: Tensor) -> Tensor:
        """Shapes: [B, F x time_factor, 3, H, W] -> [B, F, C, h, w]."""
        latents = run_all(self.encoder, functional.pixel_unshuffle(video, self.config.patch))
        if self.config.has_shortcut:
            cells = functional.pixel_unshuffle(video, self.config.space_factor)
            cells = torch.unflatten(cells, 1, (-1, self.config.time_factor)).flatten(2, 3)
            latents = latents + self.shortcut_in(cells.flatten(0, 1)).unflatten(0, cells.shape[:2])
        return latents

    def _encode_image(self, image: Tensor) -> Tensor:
        """Encode an image that fills its latent frame. Shapes: [B, 3, H, W] -> [B, C, h, w]."""
        factor = self.config.time_factor
        frame = functional.pixel_unshuffle(image, self.config.patch)
        latents = run_needed(self.encoder, [frame] * factor)
        if self.config.has_shortcut:
            cells = functional.pixel_unshuffle(image, self.config.space_factor)
            weight = sum_alike(self.shortcut_in.weight, factor)
            latents = latents + functional.conv2d(cells, weight, self.shortcut_in.bias)
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        """Shapes: [B, C, F, h, w] -> [B, 3, F x time_factor, H, W]."""
        latents = latents.transpose(1, 2) * self.std + self.mean
        video = functional.pixel_shuffle(run_all(self.decoder, latents), self.config.patch)
        if self.config.has_shortcut:
            cells = self.shortcut_out(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
            cells = cells.unflatten(2, (self.config.time_factor, -1)).flatten(1, 2)
            video = video + functional.pixel_shuffle(cells, self.config.space_factor)
        return video.transpose(1, 2)

    @torch.no_grad()
    def fit_shortcut(self, images: Tensor) -> None:
        """Set the shortcut to the principal components of images, and the last layers to zero.

        A latent frame then holds the mean of its frames. Shapes: images [B, 3, H, W].
        """
        factor, repeats = self.config.space_factor, self.config.time_factor
        cells = functional.pixel_unshuffle(images, factor).movedim(1, -1).flatten(0, -2)
        mean = cells.mean(dim=0)
        powers, axes = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
        axes = axes[:, -self.config.latent_channels :].flip(1)
        scale = powers[-1].sqrt()
        into = (axes.T / scale).repeat(1, repeats)[..., None, None] / repeats
        out = (axes * scale).repeat(repeats, 1)[..., None, None]
        self.shortcut_in.load_state_dict({"weight": into, "bias": -(axes.T @ mean) / scale})
        self.shortcut_out.load_state_dict({"weight": out, "bias": mean.repeat(repeats)})
        for last in (self.encoder[-1], self.decoder[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)


def _encoder(config: AutoencoderConfig) -> nn.Sequential:
    widths = config.widths
    layers: list[nn.Module] = [conv(3 * config.patch**2, widths[0]), nn.ReLU()]
    layers += [Memory(widths[0]) for _ in range(config.blocks[0])]
    for level, (space, time) in enumerate(zip(config.space, config.time, strict=True)):
        before, width = widths[level], widths[level + 1]
        layers += [TimePool(before, time), conv(before, width, stride=space, bias=False)]
        layers += [Memory(width) for _ in range(config.blocks[level + 1])]
    return nn.Sequential(*layers, conv(widths[-1], config.latent_channels))


def _decoder(config: AutoencoderConfig) -> nn.Sequential:
    widths = config.widths[::-1]
    layers: list[nn.Module] = [SoftClamp(), conv(config.latent_channels, widths[0]), nn.ReLU()]
    strides = zip(config.space[::-1], config.time[::-1], strict=True)
    for level, (space, time) in enumerate(strides):
        width, after = widths[level], widths[level + 1]
        layers += [Memory(width) for _ in range(config.blocks[::-1][level])]
        layers += [nn.Upsample(scale_factor=space) if space > 1 else nn.Identity()]
        layers += [TimeGrow(width, time)]
        layers += [conv(width, after, bias=False)]
    layers += [Memory(widths[-1]) for _ in range(config.blocks[0])]
    return nn.Sequential(*layers, nn.ReLU(), conv(widths[-1], 3 * config.patch**2))
