"""What tests of bundles share: roles and predictors in eager, a recipe, pictures, an adapter."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from fewshot_rt.adapter import Adapter, Provenance, add_lora, snapshot
from fewshot_rt.codecs import Codec
from fewshot_rt.export.program import Program, capture
from fewshot_rt.predictor import Predictor, Recipe, Runner
from fewshot_rt.roles import eager_runners, make_roles, make_signatures, run_eagerly
from fewshot_rt.schedule import Schedule

RECIPE = Recipe(
    task="tiny",
    codec=Codec("mask"),
    metrics=("iou",),
    size=(32, 32),
    latent_shape=(8, 2, 8, 8),
    schedule=Schedule(),
    steps=2,
    noise="seeded",
    batch=3,
)


def eager_predictor(base: Any, recipe: Recipe = RECIPE) -> Predictor:
    prompt = base.embed("mask")
    signatures = make_signatures(
        base, prompt, latents=recipe.latent_shape, size=recipe.size, batch=recipe.batch
    )
    fixed = {name: value.numpy() for name, value in prompt.items()}
    runners = eager_runners(base, signatures)
    return Predictor(runners, prompt=fixed, recipe=recipe, origin="eager")


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(9).uniform(-1, 1, (count, 3, 32, 32)).astype(np.float32)


def draw_adapter(base: Any, seed: int, *, size: float = 0.2) -> Adapter:
    """Draw an adapter of a base that changes answers: its second matrices are drawn as well.

    The base is changed.
    """
    add_lora(base, rank=4, alpha=8, seed=seed)
    origin = Provenance(
        base=base.name, revision=base.revision, task="tiny", digest=str(seed), shots=1, seed=seed,
        objective="onestep", versions={},
    )  # fmt: skip
    adapter = snapshot(base, origin)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: weight.shape for name, weight in adapter.weights.items()}
    weights = {n: size * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    return replace(adapter, weights=weights)


def freeze(
    base: Any, role: str, *, size: tuple[int, int], frames: int, batch: int = 3
) -> tuple[Program, Runner]:
    """Give the program of a role, and the eager runner that is its reference."""
    latents = base.geometry.latent_shape(frames=frames, height=size[0], width=size[1])
    signatures = make_signatures(base, base.embed("mask"), latents=latents, size=size, batch=batch)
    module, signature = make_roles(base, signatures)[role], signatures[role]
    eager = run_eagerly(module, signature, device=base.device)
    return capture(module, signature, role=role), eager


def frozen_roles(base: Any) -> Callable[[str], tuple[Program, Runner]]:
    """Make a function that freezes a role of a tiny base once."""

    @cache
    def find(role: str) -> tuple[Program, Runner]:
        return freeze(base, role, size=(32, 32), frames=5)

    return find
