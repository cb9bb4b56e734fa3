"""The loop that one would write with diffusers: what every faster way is compared with.

The adapter stays unmerged, the scheduler is diffusers' own, and all frames are decoded.
Axes: B batch, C channels, T frames, F latent frames, h w latent grid, H W pixels.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fewshot_rt.base import Base
from fewshot_rt.errors import ConfigError
from fewshot_rt.predictor import Floats, Recipe

Answer = Callable[[Floats], Floats]


def plain_loop(
    base: Base,
    *,
    prompt: Mapping[str, Tensor],
    recipe: Recipe,
    decode: Callable[[Tensor], Tensor],
) -> Answer:
    """Make the plain loop over a base with its adapter attached.

    decode: all frames of latents, [B, C, F, h, w] -> [B, 3, T, H, W].
    Raises: ConfigError if the schedule is not of the flow kind, which diffusers' Euler takes.
    """
    if (recipe.schedule.kind, recipe.schedule.spacing) != ("flow", "trailing"):
        raise ConfigError("the plain loop takes the schedule 'flow' with trailing times alone.")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=recipe.schedule.shift)
    sigmas = [1 - i / recipe.steps for i in range(recipe.steps)]

    @torch.no_grad()
    def answer(images: Floats) -> Floats:
        """Shapes: images, result [B, 3, H, W]."""
        pixels = torch.from_numpy(images).to(base.device)
        conditions = {**base.condition(pixels, frames=recipe.latent_shape[1]), **prompt}
        latents = _noise(recipe, len(images)).to(base.device)
        scheduler.set_timesteps(sigmas=sigmas, device=base.device)
        for timestep in scheduler.timesteps:
            moment = (timestep / scheduler.config.num_train_timesteps).expand(len(latents))
            prediction = base.denoiser()(latents, moment, **conditions)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        frames: Floats = decode(latents)[:, :, -1].cpu().numpy()
        return frames

    return answer


def _noise(recipe: Recipe, count: int) -> Tensor:
    """Give the noise of a recipe, the same for every image. Shapes: [B, C, F, h, w]."""
    if recipe.noise == "zero":
        return torch.zeros(count, *recipe.latent_shape)
    one = np.random.default_rng(recipe.seed).standard_normal(recipe.latent_shape, np.float32)
    return torch.from_numpy(one)[None].repeat(count, 1, 1, 1, 1)
