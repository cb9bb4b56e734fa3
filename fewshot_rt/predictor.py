"""A predictor: three roles and a recipe make an answer of an image. NumPy only.

Axes: B batch, N noises, C channels, F latent frames, h w latent grid, H W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codecs import Codec
from .errors import ConfigError, unknown
from .sample import SOLVERS, keep_ends, sample
from .schedule import Schedule

Floats = NDArray[np.float32]
Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
NOISES = ("zero", "seeded")
WAY = ("schedule", "steps", "solver", "start", "drop_after", "ends")  # what `sample` takes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that answering takes besides the networks; kept in run folders and bundles as JSON.

    size: (H, W) that the model sees. latent_shape: (C, F, h, w). noise: "zero", or "seeded" (drawn
    from `seed`, the same for every image). trained_noise, trained_steps: what the adapter was made
    for, whatever it answers best with. solver, start, drop_after, ends: see `sample`. batch: images
    answered at once; the last batch is filled up, so that an answer does not depend on how many
    images came with it.
    """

    task: str
    codec: Codec
    metrics: tuple[str, ...]
    size: tuple[int, int]
    latent_shape: tuple[int, int, int, int]
    schedule: Schedule
    steps: int = 1
    noise: str = "zero"
    trained_noise: str = "zero"
    trained_steps: int = 1
    drop_after: int | None = None
    ends: int = 1
    seed: int = 0
    solver: str = "euler"
    start: float = 1.0
    batch: int = 4

    def __post_init__(self) -> None:
        for noise in (self.noise, self.trained_noise):
            if noise not in NOISES:
                raise ConfigError(unknown("noise", noise, NOISES))
        if self.solver not in SOLVERS:
            raise ConfigError(unknown("solver", self.solver, SOLVERS))
        if self.drop_after is not None:
            self._require_drop(self.drop_after)
        if not 0 < self.start <= 1:
            raise ConfigError(f"start must be above 0 and at most 1, not {self.start}")
        if self.steps < 1 or self.batch < 1:
            raise ConfigError(f"steps ({self.steps}) and batch ({self.batch}) must be at least 1")

    def _require_drop(self, drop_after: int) -> None:
        if self.latent_shape[1] <= 2 * self.ends:
            raise ConfigError(
                f"of {self.latent_shape[1]} latent frames none is to be dropped: all are ends."
            )
        if not 1 <= drop_after < self.steps:
            raise ConfigError(
                f"frames cannot be dropped after {drop_after} of {self.steps} steps: drop them "
                "sooner, or give more --steps."
            )

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
        # Before there was a choice of noise, it was the one that the adapter was made for.
        values.setdefault("trained_noise", values.get("noise", "zero"))
        values.setdefault("trained_steps", values.get("steps", 1))
        values["codec"] = Codec.from_dict(values["codec"])
        values["schedule"] = Schedule.from_dict(values["schedule"])
        return cls(**values)


# Puts an adapter into the weights; gives its recipe and its prompt.
Adapted = Callable[[], tuple[Recipe, Mapping[str, np.ndarray]]]


class Predictor:
    """Answers images with the three roles of a model, whatever runs them.

    runners: one for each of `ROLES`, from named arrays to named arrays. prompt: the embedded
    prompt, by name. origin: what to call this model in messages and records. adapters: by name,
    each a function that puts it into the weights, and gives its recipe and prompt.
    """

    def __init__(
        self,
        runners: Mapping[str, Runner],
        *,
        prompt: Mapping[str, np.ndarray],
        recipe: Recipe,
        origin: str,
        adapters: Mapping[str, Adapted] | None = None,
    ) -> None:
        self.runners, self.prompt, self.recipe, self.origin = runners, prompt, recipe, origin
        self.adapters = adapters or {}
        self._noise = self._draw_noise()

    def use(self, name: str) -> None:
        """Answer with another adapter of the same base from now on, and with its recipe.

        Weights change in place, under compiled code that stays as it is. Whatever shares them, as
        `with_recipe` gives it, has them too, but keeps its recipe and prompt.

        Raises: ConfigError if there is no such adapter; ModelError if its file is damaged.
        """
        if name not in self.adapters:
            raise ConfigError(unknown("adapter", name, self.adapters))
        self.recipe, self.prompt = self.adapters[name]()
        self._noise = self._draw_noise()

    def answer(self, images: Floats) -> Floats:
        """Answer images.

        Shapes: images, result [B, 3, H, W] at the recipe's size, B from 1 to the recipe's batch.
        Units: pixels in [-1, 1]; the result may leave it a little.
        """
        return self._walk(self._encode(images), self._noise)[: len(images)]

    def answer_samples(self, images: Floats, noises: Floats) -> Floats:
        """Answer every image from each of several noises, as `draw_noises` gives them.

        Images are encoded once. The rows of all images and noises fill the batches, so that as many
        noises of one image as fit into a batch are one pass.

        Shapes: images [B, 3, H, W] as for `answer`; noises [N, C, F, h, w]; result [B, N, 3, H, W].
        Units: pixels in [-1, 1]; the result may leave it a little.
        """
        conditions, batch = self._encode(images), self.recipe.batch
        count = len(images) * len(noises)
        answers = []
        for start in range(0, count, batch):
            # The last batch is filled up with its last row.
            rows = np.minimum(np.arange(start, start + batch), count - 1)
            image, noise = np.divmod(rows, len(noises))
            taken = {name: value[image] for name, value in conditions.items()}
            answers.append(self._walk(taken, noises[noise]))
        pixels = np.concatenate(answers)[:count]
        return pixels.reshape(len(images), len(noises), *pixels.shape[1:])

    def _encode(self, images: Floats) -> dict[str, np.ndarray]:
        """Give what the denoiser takes of images. Shapes: images [B, 3, H, W], filled up."""
        count, batch = len(images), self.recipe.batch
        if count < batch:
            filler = np.repeat(images[-1:], batch - count, axis=0)
            images = np.concatenate([images, filler])
        return self.runners["encoder"]({"image": images})

    def _walk(self, conditions: Mapping[str, np.ndarray], noise: Floats) -> Floats:
        """Denoise and decode one full batch. Shapes: noise [B, C, F, h, w]; result [B, 3, H, W]."""
        conditions = {**conditions, **self.prompt}

        def denoise(noisy: Floats, time: Floats) -> Floats:
            tensors = {"noisy": noisy, "time": time, **self._like(noisy, conditions)}
            return self.runners["denoiser"](tensors)["prediction"]

        way = {name: getattr(self.recipe, name) for name in WAY}
        *_, last = sample(denoise, noise, **way)
        return self.runners["decoder"]({"latents": last.latents})["image"]

    def _like(
        self, noisy: Floats, conditions: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        """Give conditions of as many latent frames as are left."""
        whole = self.recipe.latent_shape[1]
        if noisy.shape[2] == whole:
            return conditions
        return {
            name: keep_ends(v, self.recipe.ends) if v.ndim == 5 and v.shape[2] == whole else v
            for name, v in conditions.items()
        }

    def with_recipe(self, **changes: Any) -> "Predictor":
        """Give the same model with another number of steps, batch and so on.

        Raises: ConfigError if a value is impossible.
        """
        recipe = replace(self.recipe, **changes)
        return Predictor(
            self.runners,
            prompt=self.prompt,
            recipe=recipe,
            origin=self.origin,
            adapters=self.adapters,
        )

    def _draw_noise(self) -> Floats:
        if self.recipe.noise == "zero":
            return np.zeros((self.recipe.batch, *self.recipe.latent_shape), np.float32)
        return np.repeat(seeded_noises(self.recipe, 1), self.recipe.batch, axis=0)


def draw_noises(recipe: Recipe, count: int) -> Floats:
    """Draw noises for several answers to one image; the first is the one that `answer` uses.

    They are the same for every image, and those of a smaller count come first.

    Shapes: [N, C, F, h, w].
    Raises: ConfigError if the count is below 2 or the model learned from no noise.
    """
    if count < 2:
        raise ConfigError(f"samples must be at least 2 to disagree, not {count}.")
    if recipe.trained_noise == "zero":
        raise ConfigError(
            "this model learned from zero noise alone, and samples from other noise would say "
            "nothing. Train with --objective diffusion or grid, or answer without samples."
        )
    return seeded_noises(recipe, count)


def seeded_noises(recipe: Recipe, count: int) -> Floats:
    """Draw noises by a recipe's seed; those of fewer come first. Shapes: [N, C, F, h, w]."""
    rng = np.random.default_rng(recipe.seed)
    return rng.standard_normal((count, *recipe.latent_shape), np.float32)
