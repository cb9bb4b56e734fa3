"""What pretraining compares: the autoencoder's pictures, and the denoiser's predictions.

Axes: B batch, C channels, T frames, H W pixels, F latent frames, h w latent grid.
"""

from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from .autoencoder import TinyVideoAutoencoder
from .bases.pocket import PROMPT_WORDS, PocketDenoiser, draw_wave_weights
from .pretrain_config import PretrainConfig
from .schedule import Schedule
from .world import VOCABULARY

SCHEDULE = Schedule(kind="flow")  # that of pocket
LATENT_NOISE = 0.02
# Latents beyond this are pressed back: the decoder clamps at 3.
WIDEST_LATENT = 2
# Times are logit-normal, as in `objectives.diffusion_loss`, and not below this.
EARLIEST = 0.01


class WordDenoiser(nn.Module):
    """The denoiser with the table of words in front, so that both are trained as one."""

    def __init__(self, transformer: WanTransformer3DModel, width: int) -> None:
        super().__init__()
        self.denoiser = PocketDenoiser(transformer)
        self.words = nn.Embedding(len(VOCABULARY), width)
        draw_wave_weights(transformer)

    def forward(self, noisy: Tensor, moment: Tensor, first: Tensor, words: Tensor) -> Tensor:
        """Predict noise - clean for clips whose event and pace are named, 0 for silence.

        Shapes: noisy [B, C, F, h, w]; moment [B]; first [B, C, 1, h, w]; words [B, 2].
        """
        event, pace = words.unbind(1)
        # Said over and over, as `PromptTable.ids` does: "mirror", or "mirror slowly".
        said = torch.stack(
            [torch.where(event == 0, pace, event), torch.where(pace == 0, event, pace)], dim=1
        )
        prompt = self.words(said.repeat(1, PROMPT_WORDS // 2))
        prediction: Tensor = self.denoiser(noisy, moment, first, prompt)
        return prediction


def reconstruction_loss(
    autoencoder: TinyVideoAutoencoder, video: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Compare a video with what comes back: pixels and their differences, absolute.

    The latents get a little noise, and wide ones weigh. Shapes: video [B, 3, T, H, W].
    """
    latents = autoencoder.encode(video)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    error = autoencoder.decode(latents + LATENT_NOISE * noise).float() - video
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (-1, -2))
    spread = functional.relu(latents.float().abs() - WIDEST_LATENT).square().mean()
    return error.abs().mean() + 0.5 * edges + 0.1 * spread


def denoising_loss(
    predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    clips: tuple[Tensor, Tensor],
    *,
    config: PretrainConfig,
    generator: torch.Generator,
) -> Tensor:
    """Compare predictions with flow matching's target on the frames after the first.

    Many clips are at the last time with the noise left out: the state from which one-step adapters
    start.

    predict: takes noisy latents, time, first frame and words. clips: latents and words.
    Shapes: latents [B, C, F, h, w]; words [B, 2].
    Source: Lipman et al. 2023, eq. 23; times are logit-normal, Esser et al. 2024, sec. 3.1.
    """
    latents, words = clips
    batch, device = latents.shape[0], latents.device
    draw = torch.rand((2, batch), generator=generator, device=device)
    normal = torch.randn((batch,), generator=generator, device=device)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    is_noiseless = draw[0] < config.zero_noise
    is_last = draw[0] < config.zero_noise + config.pure_noise
    moment = torch.where(is_last, 1.0, torch.sigmoid(normal).clamp(EARLIEST, 1))
    noise = noise * (~is_noiseless)[:, None, None, None, None]
    is_named = draw[1] >= config.silent_words
    words = torch.stack([words[:, 0] * is_named, words[:, 1]], dim=1)
    noisy = SCHEDULE.noise(latents, noise, moment)
    prediction = predict(noisy, moment, latents[:, :, :1], words)
    target = SCHEDULE.target(latents, noise, moment)
    return functional.mse_loss(prediction.float()[:, :, 1:], target[:, :, 1:])
