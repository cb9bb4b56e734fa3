"""What training minimises: the rungs of the ladder from many denoising steps to one.

diffusion: all times, as in pretraining. grid: the few times at which the sampler will stop.
onestep: pure "noise" that is zero, and the clean latents at once.
Every loss takes (schedule, predict, clean, generator, known); the first `known` frames of the clean
latents do not count. Axes: B batch, C channels, F latent frames, h w latent grid.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from .base import Base
from .errors import ConfigError
from .schedule import Schedule
from .train_config import TrainConfig

Predict = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Schedule, Predict, Tensor, torch.Generator, int], Tensor]
EDGES = 0.5  # how much differences between neighbours weigh beside values


def onestep_loss(
    schedule: Schedule,
    predict: Predict,
    clean: Tensor,
    generator: torch.Generator,  # noqa: ARG001
    known: int,
    *,
    start: float = 1.0,
    pixels: float = 0.0,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compare the clean latents that one step from zero noise gives: values, and their differences.

    start: the time that zero noise is taken to be at. pixels: how much the absolute error of the
    decoded last frame weighs beside that of the latents. Shapes: clean [B, C, F, h, w].
    Source: Garcia et al. 2025 (fixed last time, zero noise); DVD 2026, arXiv 2603.12250 (another
    time than the last).
    """
    moment = torch.full_like(clean[:, 0, 0, 0, 0], start)
    noisy = torch.zeros_like(clean)
    found, _ = schedule.split(noisy, predict(noisy, moment), moment)
    error = (found - clean)[:, :, known:]
    edges = error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()
    loss: Tensor = error.square().mean() + EDGES * edges
    if pixels and decode is not None:
        with torch.no_grad():
            target = decode(clean)
        loss = loss + pixels * functional.l1_loss(decode(found).float(), target.float())
    return loss


def diffusion_loss(
    schedule: Schedule, predict: Predict, clean: Tensor, generator: torch.Generator, known: int
) -> Tensor:
    """Compare the prediction at a random time with the schedule's target (the paper's objective).

    Shapes: clean [B, C, F, h, w].
    Source: Lipman et al. 2023, eq. 23; times are logit-normal, Esser et al. 2024, sec. 3.1.
    """
    normal = torch.randn(len(clean), generator=generator)
    moment = torch.sigmoid(normal).clamp(0.001, 1).to(clean.device)
    return _noisy_loss(schedule, predict, clean, generator, known, moment)


def grid_loss(
    schedule: Schedule,
    predict: Predict,
    clean: Tensor,
    generator: torch.Generator,
    known: int,
    *,
    steps: int,
) -> Tensor:
    """Compare as `diffusion_loss` does, at the times of a sampler of so many steps alone.

    Half of the clips are at pure noise, where the first step decides most.
    Shapes: clean [B, C, F, h, w].
    Source: Glance 2025, arXiv 2512.02899.
    """
    times = torch.tensor(schedule.at(clean[0, 0].numel()).times(steps)[:-1])
    drawn = torch.randint(steps, (len(clean),), generator=generator)
    is_first = torch.rand(len(clean), generator=generator) < 0.5
    moment = times[drawn.masked_fill(is_first, 0)].to(clean)
    return _noisy_loss(schedule, predict, clean, generator, known, moment)


def choose_loss(config: TrainConfig, base: Base) -> Loss:
    """Give the loss that settings ask for.

    Raises: ConfigError if a setting belongs to another objective, or pixels are to be compared and
    the base has no tiny decoder.
    """
    wanted = {"start": "onestep", "pixel_loss": "onestep", "grid_steps": "grid"}
    for name, objective in wanted.items():
        default = TrainConfig.__dataclass_fields__[name].default
        if config.objective != objective and getattr(config, name) != default:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} belongs to the objective {objective}, not {config.objective}."
            )
    if config.objective == "diffusion":
        return diffusion_loss
    if config.objective == "grid":
        return partial(grid_loss, steps=config.grid_steps)
    if config.pixel_loss and "decoder" not in base.tiny_roles:
        raise ConfigError(
            f"--pixel-loss would take the whole decoder of {base.name} into every update: give a "
            "tiny one with --vae, if there is one for it, or leave it out."
        )
    return partial(
        onestep_loss, start=config.start, pixels=config.pixel_loss, decode=base.decode_last
    )


def _noisy_loss(
    schedule: Schedule,
    predict: Predict,
    clean: Tensor,
    generator: torch.Generator,
    known: int,
    moment: Tensor,
) -> Tensor:
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    prediction = predict(schedule.noise(clean, noise, moment), moment)
    target = schedule.target(clean, noise, moment)
    return functional.mse_loss(prediction[:, :, known:], target[:, :, known:])
