"""How good a base like pocket is by itself: what its autoencoder keeps, and which events it knows.

Everything is measured on scenes that pretraining never drew, and on photographs. Axes: B clips,
C channels, T frames, H W pixels.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewshot_rt.errors import ConfigError
from fewshot_rt.images import Pixels, to_model, to_uint8
from fewshot_rt.metrics import psnr, ssim
from fewshot_rt.sample import sample
from fewshot_rt.world import EVENTS, make_clips

from .photographs import NAMES, of_photographs
from .record import Record

SEED = 1 << 40  # of the clips; pretraining draws from smaller seeds
LEAST_SKILL = -1.0
BATCH = 8
FRAMES = 5


def measure_autoencoder(base: Any, *, count: int) -> Record:
    """Measure how near the last frame of a video comes back: PSNR in dB, and SSIM.

    count: clips of the world, with one event each, and crops of photographs, shown as still videos.
    Raises: DataError if scikit-image is not installed.
    """
    size = base.geometry.native[0]
    generator = torch.Generator().manual_seed(SEED)
    clips = make_clips(count, size=size, generator=generator, frames=FRAMES).video
    draw = of_photographs(lambda crop, _: (crop, crop))
    pictures = [crop for split in NAMES for crop in draw(split, -(-count // 2), size, 0)[0]]
    stills = torch.from_numpy(np.stack([to_model(picture, (size, size)) for picture in pictures]))
    videos = {
        "world": clips,
        "photographs": stills[:, :, None].expand(-1, -1, FRAMES, -1, -1),
    }
    return Record(
        kind="quality",
        case=f"{base.name}-autoencoder",
        images=count,
        reference="world",
        variants={name: _restoration(base, video) for name, video in videos.items()},
        settings={"revision": base.revision, "size": size, "frames": FRAMES},
    )


def measure_events(base: Any, *, count: int, size: int | None = None) -> Record:
    """Measure what one step from zero noise makes of clips whose event is named, event by event.

    skill: 1 - error / error of the better of copying the first frame and showing the mean of the
    other clips' last ones; 1 is perfect, 0 no better, below -1 counts as -1. autoencoder: the skill
    of the last frame encoded and decoded, which bounds it.

    count: clips of each event, at least 2. size: a side of them; None is the native one.
    Raises: ConfigError if the size does not fit the base.
    """
    size = size or base.geometry.native[0]
    if size % base.geometry.multiple:
        raise ConfigError(f"size must be a multiple of {base.geometry.multiple}, not {size}")
    variants = {event: _knowledge(base, event, count, size) for event in EVENTS}
    names = next(iter(variants.values()))
    mean = {name: float(np.mean([values[name] for values in variants.values()])) for name in names}
    return Record(
        kind="quality",
        case=f"{base.name}-events",
        images=count * len(EVENTS),
        reference="all events",
        variants={"all events": mean, **variants},
        settings={"revision": base.revision, "size": size, "clips of an event": count},
    )


@torch.no_grad()
def _restoration(base: Any, video: Tensor) -> dict[str, float]:
    pairs = [
        (base.decode_last(base.encode(part)), part[:, :, -1]) for part in torch.split(video, BATCH)
    ]
    restored, wanted = (_pictures(torch.cat(parts)) for parts in zip(*pairs, strict=True))
    both = list(zip(restored, wanted, strict=True))
    return {
        "psnr": float(np.mean([psnr(one / 255, other / 255) for one, other in both])),
        "ssim": float(np.mean([ssim(one / 255, other / 255) for one, other in both])),
    }


@torch.no_grad()
def _knowledge(base: Any, event: str, count: int, size: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(SEED + list(EVENTS).index(event))
    video = make_clips(
        count, size=size, generator=generator, frames=FRAMES, events=(event,), pace="repeat_target"
    ).video
    first, last = video[:, :, 0], video[:, :, -1]
    found = [_answers(base, part, base.embed(event)) for part in torch.split(video, BATCH)]
    answers = {
        name: torch.cat(parts).clamp(-1, 1)
        for name, parts in zip(("skill", "autoencoder"), zip(*found, strict=True), strict=True)
    }
    mean_of_others = (last.sum(dim=0, keepdim=True) - last) / (count - 1)
    least = max(1e-9, min(_error(answer, last) for answer in (first, mean_of_others)))
    skills = {name: 1 - _error(answer, last) / least for name, answer in answers.items()}
    return {name: max(LEAST_SKILL, skill) for name, skill in skills.items()}


def _answers(base: Any, video: Tensor, prompt: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Give the last frame as one step has it, and as the autoencoder restores it."""
    latents = base.encode(video)
    conditions = base.condition(video[:, :, 0], frames=latents.shape[2]) | prompt
    denoiser = base.denoiser()
    *_, last = sample(
        lambda x, t: denoiser(x, t, **conditions),
        torch.zeros_like(latents),
        schedule=base.schedule,
        steps=1,
    )
    return base.decode_last(last.latents), base.decode_last(latents)


def _error(answer: Tensor, wanted: Tensor) -> float:
    return float((answer - wanted).square().mean())


def _pictures(images: Iterable[Tensor]) -> list[Pixels]:
    return [to_uint8(image.permute(1, 2, 0).numpy()) for image in images]
