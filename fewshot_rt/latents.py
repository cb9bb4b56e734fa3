"""The latents of a task's transition videos and its prompt, encoded once and kept by content.

Axes: N clips, C channels, F latent frames, h w latent grid.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .augment import Augmentation
from .base import Base
from .files import whole
from .images import to_model
from .task import Task

# Pixels of the videos that are encoded at once; a larger video goes alone.
ENCODE_PIXELS = 8 * 5 * 128 * 128


def embed_prompt(base: Base, prompt: str, *, cache: Path) -> dict[str, Tensor]:
    """Embed a prompt, or read it from the cache. Shapes: every tensor [1, ...]."""
    path = cache / f"{_digest({'base': [base.name, base.revision], 'prompt': prompt})}.safetensors"
    embedded = _read(path)
    if embedded is None:
        embedded = base.embed(prompt)
        with whole(path) as temporary:
            save_file({n: v.cpu().contiguous() for n, v in embedded.items()}, temporary)
    return {name: value.to(base.device) for name, value in embedded.items()}


@torch.no_grad()
def encode_task(
    base: Base,
    task: Task,
    *,
    size: tuple[int, int],
    augmentation: Augmentation,
    variants: int,
    seed: int,
    cache: Path,
) -> dict[str, Tensor]:
    """Encode the videos of all pairs, each in several variants, or read them from the cache.

    Shapes: "clean" [N, C, F, h, w], N = pairs x variants, the pairs themselves first; besides it
    the base's conditions by name, [N, ...].
    """
    if not augmentation.kinds:
        variants = 1
    key = {
        "base": [base.name, base.revision],
        "device": base.device.type,  # on which the autoencoder may compute in bf16
        "task": task.digest(),
        "pairs": [pair.name for pair in task.pairs],
        "size": size,
        "augmentation": augmentation.kinds,
        "variants": variants,
        "seed": seed,
    }
    path = cache / f"{_digest(key)}.safetensors"
    kept = _read(path)
    if kept is not None:
        return kept
    batch = max(1, ENCODE_PIXELS // (task.transition.frames * size[0] * size[1]))
    parts = list(_encode(base, _videos(task, size, augmentation, variants, seed), batch))
    latents = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with whole(path) as temporary:
        save_file(latents, temporary)
    return latents


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _videos(
    task: Task, size: tuple[int, int], augmentation: Augmentation, variants: int, seed: int
) -> Iterator[np.ndarray]:
    loaded = list(task.load_pairs())
    for pair in augmentation.variants(loaded, count=variants, seed=seed):
        yield task.transition.video(*(to_model(image, size) for image in pair))


def _encode(base: Base, videos: Iterator[np.ndarray], batch: int) -> Iterator[dict[str, Tensor]]:
    waiting: list[np.ndarray] = []
    for video in videos:
        waiting.append(video)
        if len(waiting) == batch:
            yield _encode_batch(base, waiting)
            waiting = []
    if waiting:
        yield _encode_batch(base, waiting)


def _encode_batch(base: Base, videos: list[np.ndarray]) -> dict[str, Tensor]:
    pixels = torch.from_numpy(np.stack(videos)).to(base.device)
    clean = base.encode(pixels)
    tensors = {"clean": clean} | base.condition(pixels[:, :, 0], frames=clean.shape[2])
    return {name: value.float().cpu().contiguous() for name, value in tensors.items()}


def _read(path: Path) -> dict[str, Tensor] | None:
    """Read kept latents; a damaged file counts as none and is written anew."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None
