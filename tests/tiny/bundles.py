"""What tests of bundles share: a recipe for the tiny pocket, its eager predictor, and pictures."""

from typing import Any

import numpy as np

from fewshot_rt.codecs import Codec
from fewshot_rt.predictor import Predictor, Recipe
from fewshot_rt.roles import eager_runners, make_signatures
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
