"""An adapter teaches itself: its own long walk in a few steps, on images without targets.

The teacher walks from noise to the clean latents in many small steps. The student, which begins as
the teacher, learns to go each of its few steps at once: at the latents where a step begins, to
predict what leads to where the teacher is when the step ends. Nothing is propagated back through
the walk.
Axes: N walks times steps, B batch, C channels, F latent frames, h w latent grid.
Source: Luhman & Luhman 2021 (distillation of cached trajectories); Salimans & Ho 2022, app. G (the
target of one step).
"""

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapter import Adapter, Provenance, snapshot
from .base import Base
from .config import make
from .device import arithmetic, enough_memory, pick_device
from .distill_config import REPORT_FILE, DistillConfig
from .errors import DataError, ModelError
from .files import reported, write_json, write_text
from .fit import probe, require_effect
from .images import find_images, read_image, to_model
from .objectives import Predict
from .predictor import Floats, Recipe
from .runs import CONFIG_FILE, TASK_FILE, base_predictor, mark_latest, open_attached, read_run
from .train import Lesson, TrainStep, learn
from .train_config import TrainConfig

OWN = ("noisy", "time", "target")
MOST_JUDGED = 8
SHARE = 5  # one image in so many is kept to judge by


def distill(run: Path, images: Path, folder: Path, config: DistillConfig) -> Iterator[TrainStep]:
    """Let the adapter of a run learn its own walk in fewer steps; write it as a run of its own.

    How near student and teacher come on images that were kept apart is in `distilled.json`, beside
    as few steps of the teacher itself. A folder with a saved state goes on from it.
    Raises: ModelError if the run learned one step from zero noise; DataError if there is no image.
    """
    device = pick_device(config.device)
    values = read_run(run)
    if values["train"]["objective"] == "onestep":
        raise ModelError(
            f"{run} answers in one step as it is. Distill runs of --objective diffusion or grid."
        )
    paths = find_images(images)
    if not paths:
        raise DataError(f"{images} holds no images (png, jpg, webp, bmp, tif).")
    kept = paths[::SHARE][:MOST_JUDGED] if len(paths) > 1 else paths
    learned = [path for path in paths if path not in kept] or paths
    with enough_memory():
        base, adapter, values = open_attached(run, device=device)
        recipe = replace(values["recipe"], noise="seeded", steps=config.steps)
        teacher = replace(recipe, steps=config.teacher_steps)
        train_config = _settings(values["train"], base, config, device=device)
        judge = _Judge(base, kept, recipe, values["prompt"])
        expected, before = judge.answer(teacher), judge.answer(recipe)
        bare = judge.predictor.answer(probe(judge.predictor))
        shown = _load(learned, recipe)
        lesson = make_lesson(base, shown, values["prompt"], recipe=recipe, config=config)
        base.rest()
        yield from learn(base, lesson, train_config, folder, trainable=adapter_parameters)
        after = judge.answer(recipe)
        trained = judge.predictor.with_recipe(steps=recipe.steps, noise=recipe.noise)
        told = trained.answer(probe(trained))
    provenance = replace(
        adapter.provenance, objective="distilled", steps=config.updates, seed=config.seed
    )
    _write(run, folder, snapshot(base, provenance), recipe, config)
    report = {
        "steps": config.steps,
        "teacher_steps": config.teacher_steps,
        "images": len(kept),
        "error_before": _distance(before, expected),
        "error": _distance(after, expected),
    }
    write_json(folder / REPORT_FILE, report)
    del judge, trained, base
    gc.collect()
    require_effect(folder, bare, told, train_config)
    mark_latest(folder)


def make_lesson(
    base: Base,
    images: Sequence[Floats],
    prompt: dict[str, Tensor],
    *,
    recipe: Recipe,
    config: DistillConfig,
) -> Lesson:
    """Walk from every image, and let each step of the student be learned; see `walk`."""
    encoded = walk(base, images, prompt, recipe, config)
    return Lesson(encoded=encoded, own=OWN, prompt=prompt, loss=_of_steps(base))


def adapter_parameters(base: Base) -> list[tuple[str, nn.Parameter]]:
    """Give the weights of the adapter that is attached to a base, by name."""
    named = base.denoiser().get_submodule("transformer").named_parameters()
    return [(name, parameter) for name, parameter in named if parameter.requires_grad]


@torch.no_grad()
def walk(
    base: Base,
    images: Sequence[Floats],
    prompt: Mapping[str, Tensor],
    recipe: Recipe,
    config: DistillConfig,
) -> dict[str, Tensor]:
    """Walk as the teacher does; give where every step of the student begins, and its target.

    The first noise of every image is the one that the recipe answers with.
    Shapes: images [3, H, W]; "noisy", "target" [N, C, F, h, w]; "time" [N]; and the base's
    conditions [N, ...], N = images x draws x steps.
    """
    generator = np.random.default_rng(config.seed)
    own = np.random.default_rng(recipe.seed).standard_normal(recipe.latent_shape, np.float32)
    parts = []
    for start in range(0, len(images), base.batch):
        pixels = torch.from_numpy(np.stack(images[start : start + base.batch])).to(base.device)
        conditions = base.condition(pixels, frames=recipe.latent_shape[1])
        seen = {name: value.float().cpu() for name, value in conditions.items()}
        for draw in range(config.draws):
            shape = (len(pixels), *own.shape)
            noise = np.broadcast_to(own, shape)
            if draw:
                noise = generator.standard_normal(shape, np.float32)
            steps = _steps(base, noise, {**conditions, **prompt}, recipe, config)
            parts += [part | seen for part in steps]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _steps(
    base: Base,
    noise: Floats,
    conditions: Mapping[str, Tensor],
    recipe: Recipe,
    config: DistillConfig,
) -> Iterator[dict[str, Tensor]]:
    """Walk from noises and yield each step of the student. Shapes: noise [B, C, F, h, w]."""
    schedule, denoiser = recipe.schedule, base.denoiser()
    latents = torch.from_numpy(noise.copy()).to(base.device)
    small = -(-config.teacher_steps // config.steps)
    for time, next_time in pairwise(schedule.times(config.steps)):
        begun = latents
        for moment, later in pairwise(np.linspace(time, next_time, small + 1).tolist()):
            with arithmetic(base.device, "auto" if base.device.type == "cuda" else "fp32"):
                prediction = denoiser(
                    latents, latents.new_full((len(noise),), moment), **conditions
                )
            latents = schedule.step(latents, prediction.float(), moment, later)
        # A step is linear in the prediction: what leads from begun to latents follows.
        still = schedule.step(begun, torch.zeros_like(begun), time, next_time)
        gain = schedule.step(0.0, 1.0, time, next_time)
        target = (latents - still) / gain
        yield {
            "noisy": begun.cpu(),
            "target": target.cpu(),
            "time": torch.full((len(noise),), time),
        }


def _of_steps(base: Base) -> Any:
    known = base.geometry.known_frames

    def loss(predict: Predict, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:  # noqa: ARG001
        prediction = predict(batch["noisy"], batch["time"])
        return functional.mse_loss(prediction[:, :, known:], batch["target"][:, :, known:])

    return loss


class _Judge:
    """Answers images that were kept apart, with whatever the adapter is at the time."""

    def __init__(
        self, base: Base, paths: Sequence[Path], recipe: Recipe, prompt: Mapping[str, Tensor]
    ) -> None:
        self.predictor = base_predictor(base, recipe, prompt, origin="judge")
        self.images = np.stack(_load(paths, recipe))

    def answer(self, recipe: Recipe) -> Floats:
        predictor = self.predictor.with_recipe(steps=recipe.steps, noise=recipe.noise)
        batch = recipe.batch
        parts = [self.images[i : i + batch] for i in range(0, len(self.images), batch)]
        return np.concatenate([predictor.answer(part) for part in parts])


def _load(paths: Sequence[Path], recipe: Recipe) -> list[Floats]:
    return [to_model(read_image(path), recipe.size) for path in paths]


def _settings(
    trained: Mapping[str, Any], base: Base, config: DistillConfig, *, device: str
) -> TrainConfig:
    """Give settings of training for the student: those of the teacher, but for rate and length."""
    before = make(TrainConfig, dict(trained))
    rate = config.rate or before.suited(base.suited).rate / 4
    return replace(
        before,
        steps=config.updates,
        minutes=None,
        rate=rate,
        seed=config.seed,
        device=device,
    )


def _write(
    run: Path, folder: Path, adapter: Adapter, recipe: Recipe, config: DistillConfig
) -> None:
    """Write the student as a run: what is not its own is the teacher's."""
    for name in (TASK_FILE, "prompt.safetensors"):
        if (run / name).is_file():
            with reported(folder / name):
                (folder / name).write_bytes((run / name).read_bytes())
    values = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))
    values["recipe"] = recipe.to_dict()
    values["distilled"] = {"from": run.resolve().name, **vars(config)}
    write_json(folder / CONFIG_FILE, values)
    adapter.save(folder)
    write_text(folder / "card.md", _card(run, adapter.provenance, config))


def _card(run: Path, origin: Provenance, config: DistillConfig) -> str:
    return f"""---
base_model: {origin.base}
library_name: peft
tags: [few-shot, image-to-image, fewshot-rt]
---

# {run.resolve().name}, distilled

The adapter of `{run.resolve().name}` for `{origin.base}` (revision {origin.revision}), which taught
itself by `fewshot-rt distill` to walk in {config.steps} steps where it took {config.teacher_steps}:
{config.updates} updates, seed {config.seed}.
"""


def _distance(found: Floats, expected: Floats) -> float:
    """Give the root mean square of the difference; 2 is black against white."""
    return float(np.sqrt(np.mean(np.square(found - expected))))
