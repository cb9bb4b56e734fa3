"""A predictor: three roles and a recipe make an answer of an image. NumPy only.

Axes: B batch, C channels, F latent frames, h w latent grid, H W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codecs import Codec
from .errors import ConfigError, unknown
from .sample import SOLVERS, sample
from .schedule import Schedule

Floats = NDArray[np.float32]
Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
NOISES = ("zero", "seeded")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that answering takes besides the networks; kept in run folders and bundles as JSON.

    size: (H, W) that the model sees. latent_shape: (C, F, h, w). noise: "zero", or "seeded" (drawn
    from `seed`, the same for every image). solver, start: see `sample`. batch: images answered at
    once; the last batch is filled up, so that an answer does not depend on how many images came
    with it.
    """

    task: str
    codec: Codec
    metrics: tuple[str, ...]
    size: tuple[int, int]
    latent_shape: tuple[int, int, int, int]
    schedule: Schedule
    steps: int = 1
    noise: str = "zero"
    seed: int = 0
    solver: str = "euler"
    start: float = 1.0
    batch: int = 4

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise ConfigError(unknown("noise", self.noise, NOISES))
        if self.solver not in SOLVERS:
            raise ConfigError(unknown("solver", self.solver, SOLVERS))
        if not 0 < self.start <= 1:
            raise ConfigError(f"start must be above 0 and at most 1, not {self.start}")
        if self.steps < 1 or self.batch < 1:
            raise ConfigError(f"steps ({self.steps}) and batch ({self.batch}) must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        values = dict(vars(self))
        values["codec"] = self.codec.to_dict()
        values["schedule"] = self.schedule.to_dict()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Make a recipe from what `to_dict` gave, or from its JSON."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        values["codec"] = Codec.from_dict(values["codec"])
        values["schedule"] = Schedule.from_dict(values["schedule"])
        return cls(**values)


class Predictor:
    """Answers images with the three roles of a model, whatever runs them.

    runners: one for each of `ROLES`, from named arrays to named arrays. prompt: the embedded
    prompt, by name. origin: what to call this model in messages and records.
    """

    def __init__(
        self,
        runners: Mapping[str, Runner],
        *,
        prompt: Mapping[str, np.ndarray],
        recipe: Recipe,
        origin: str,
    ) -> None:
        self.runners, self.prompt, self.recipe, self.origin = runners, prompt, recipe, origin
        self._noise = self._draw_noise()

    def answer(self, images: Floats) -> Floats:
        """Answer images.

        Shapes: images, result [B, 3, H, W] at the recipe's size, B from 1 to the recipe's batch.
        Units: pixels in [-1, 1]; the result may leave it a little.
        """
        count, batch = len(images), self.recipe.batch
        if count < batch:
            filler = np.repeat(images[-1:], batch - count, axis=0)
            images = np.concatenate([images, filler])
        conditions = self.runners["encoder"]({"image": images}) | dict(self.prompt)

        def denoise(noisy: Floats, time: Floats) -> Floats:
            tensors = {"noisy": noisy, "time": time, **conditions}
            return self.runners["denoiser"](tensors)["prediction"]

        way = {
            name: getattr(self.recipe, name) for name in ("schedule", "steps", "solver", "start")
        }
        *_, last = sample(denoise, self._noise, **way)
        return self.runners["decoder"]({"latents": last.latents})["image"][:count]

    def with_recipe(self, **changes: Any) -> "Predictor":
        """Give the same model with another number of steps, batch and so on.

        Raises: ConfigError if a value is impossible.
        """
        recipe = replace(self.recipe, **changes)
        return Predictor(self.runners, prompt=self.prompt, recipe=recipe, origin=self.origin)

    def _draw_noise(self) -> Floats:
        shape = self.recipe.latent_shape
        if self.recipe.noise == "zero":
            return np.zeros((self.recipe.batch, *shape), np.float32)
        one = np.random.default_rng(self.recipe.seed).standard_normal(shape, np.float32)
        return np.repeat(one[None], self.recipe.batch, axis=0)
