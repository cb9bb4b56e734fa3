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
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapter import WEIGHTS_FILE, Provenance, snapshot
from .base import Base
from .checkpoints import digest_file
from .config import make
from .device import arithmetic, enough_memory, pick_device
from .distill_config import REPORT_FILE, DistillConfig
from .errors import DataError, ModelError
from .files import whole, write_json, write_text
from .fit import probe, remove_run, require_effect
from .images import find_images, read_image, to_model
from .objectives import Predict
from .predictor import Floats, Recipe, seeded_noises
from .runs import (
    CONFIG_FILE,
    PROMPT_FILE,
    TASK_FILE,
    base_predictor,
    mark_latest,
    open_attached,
    read_run,
)
from .schedule import Schedule
from .train import STATE_FILE, Lesson, TrainStep, learn
from .train_config import TrainConfig

OWN = ("noisy", "time", "target")
MOST_JUDGED = 8
SHARE = 5  # one image in so many is kept to judge by


def distill(
    run: Path, images: Path, folder: Path, config: DistillConfig, *, overwrite: bool = False
) -> Iterator[TrainStep]:
    """Let the adapter of a run learn its own walk in fewer steps; write it as a run of its own.

    How near student and teacher come on images that were kept apart is in `distilled.json`, beside
    as few steps of the teacher itself. A folder that holds a saved state goes on from it, after
    walking again, and all must be the same; to overwrite, the folder is emptied once run, images
    and base have proved good.
    Raises: ModelError if the run learned one step from zero noise, or the folder is the run itself
    or was begun otherwise; DataError if there is no image.
    """
    device = pick_device(config.device)
    _require_teacher(run, folder)
    paths = find_images(images)
    if not paths:
        raise DataError(f"{images} holds no images (png, jpg, webp, bmp, tif).")
    kept = paths[::SHARE][:MOST_JUDGED] if len(paths) > 1 else paths
    learned = [path for path in paths if path not in kept] or paths
    with enough_memory():
        base, adapter, values = open_attached(run, device=device)
        if overwrite:
            remove_run(folder, keep=images)
        prompt = values["prompt"]
        recipe = replace(
            values["recipe"], noise="seeded", steps=config.steps, trained_steps=config.steps
        )
        settings = student_settings(make(TrainConfig, values["train"]), base, config)
        settings = replace(settings, device=device)
        _begin(run, folder, recipe, _origin(run, paths, config))
        judge = _Judge(base, kept, recipe, prompt)
        expected, before = (judge.answer(n) for n in (config.teacher_steps, config.steps))
        bare = judge.predictor.answer(probe(judge.predictor))
        chosen = _choose(learned, settings.suited(base.suited).batch, config)
        parts: list[dict[str, Tensor]] = []
        for part in walk(base, _load(chosen, recipe), prompt, recipe, config):
            parts.append(part)
            yield _walked(len(parts), -(-len(chosen) // base.batch) * config.draws * config.steps)
        lesson = make_lesson(base, parts, prompt)
        base.rest()
        yield from learn(base, lesson, settings, folder, trainable=adapter_parameters)
        after, told = judge.answer(config.steps), judge.predictor.answer(probe(judge.predictor))
    provenance = replace(
        adapter.provenance, objective="distilled", steps=config.updates, seed=config.seed
    )
    snapshot(base, provenance).save(folder)
    report = {
        "steps": config.steps,
        "teacher_steps": config.teacher_steps,
        "images": len(kept),
        "error_before": _distance(before, expected),
        "error": _distance(after, expected),
    }
    write_json(folder / REPORT_FILE, report)
    write_text(folder / "card.md", _card(run, provenance, config))
    del judge, base
    gc.collect()
    require_effect(folder, bare, told, settings)
    mark_latest(folder)


def student_settings(trained: TrainConfig, base: Base, config: DistillConfig) -> TrainConfig:
    """Give settings of training for a student: the teacher's, but for length, rate and seed."""
    rate = config.rate or trained.suited(base.suited).rate / 4
    return replace(trained, steps=config.updates, minutes=None, rate=rate, seed=config.seed)


def make_lesson(
    base: Base, walks: Iterable[dict[str, Tensor]], prompt: dict[str, Tensor]
) -> Lesson:
    """Let each step of the student be learned from what `walk` gives."""
    parts = list(walks)
    encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
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
) -> Iterator[dict[str, Tensor]]:
    """Walk as the teacher does; yield where a step of the student begins, and its target.

    The first noise of every image is the one that the recipe answers with.
    Shapes: images [3, H, W]; "noisy", "target" [B, C, F, h, w]; "time" [B]; and the base's
    conditions [B, ...], for batches of images, all draws and all steps of each.
    """
    generator = np.random.default_rng(config.seed)
    (own,) = seeded_noises(recipe, 1)
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
            yield from (part | seen for part in steps)


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
    for moments in _teacher_times(schedule, config):
        begun, time, next_time = latents, moments[0], moments[-1]
        for moment, later in pairwise(moments):
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


def _teacher_times(schedule: Schedule, config: DistillConfig) -> Iterator[list[float]]:
    """Give the teacher's times within each step of the student, both ends included.

    They are the schedule's own where those of the student are among them; else even.
    """
    small = -(-config.teacher_steps // config.steps)
    own = schedule.times(small * config.steps)
    for index, (time, later) in enumerate(pairwise(schedule.times(config.steps))):
        within = list(own[index * small : (index + 1) * small + 1])
        if not np.allclose((within[0], within[-1]), (time, later)):
            within = np.linspace(time, later, small + 1).tolist()
        yield [time, *within[1:-1], later]


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

    def answer(self, steps: int) -> Floats:
        predictor = self.predictor.with_recipe(steps=steps)
        batch = predictor.recipe.batch
        parts = [self.images[i : i + batch] for i in range(0, len(self.images), batch)]
        return np.concatenate([predictor.answer(part) for part in parts])


def _load(paths: Sequence[Path], recipe: Recipe) -> list[Floats]:
    return [to_model(read_image(path), recipe.size) for path in paths]


def _require_teacher(run: Path, folder: Path) -> None:
    if folder.resolve() == run.resolve():
        raise ModelError(f"{folder} is the run that teaches. Take another --name.")
    if read_run(run)["train"]["objective"] == "onestep":
        raise ModelError(
            f"{run} answers in one step as it is. Distill runs of --objective diffusion or grid."
        )


def _origin(run: Path, paths: Sequence[Path], config: DistillConfig) -> dict[str, Any]:
    """Say what a student is made of."""
    names = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return {
        "from": run.resolve().name,
        "adapter": digest_file(run / "adapter" / WEIGHTS_FILE),
        "images": hashlib.sha256(names.encode()).hexdigest()[:12],
        **{name: value for name, value in vars(config).items() if name != "device"},
    }


def _begin(run: Path, folder: Path, recipe: Recipe, origin: dict[str, Any]) -> None:
    """Write what a student's run needs besides its adapter: what is not its own is the teacher's.

    Raises: ModelError if another student was begun there.
    """
    if (folder / STATE_FILE).is_file():
        before = read_run(folder).get("distilled", {})
        differing = [name for name in origin if before.get(name) != origin[name]]
        if differing:
            raise ModelError(
                f"{folder} was begun otherwise: {', '.join(differing)}. Go on with the same, or "
                "take another --name, or --overwrite."
            )
    for name in (TASK_FILE, PROMPT_FILE):
        if (run / name).is_file():
            with whole(folder / name) as temporary:
                shutil.copyfile(run / name, temporary)
    values = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))
    values |= {"recipe": recipe.to_dict(), "distilled": origin}
    write_json(folder / CONFIG_FILE, values)


def _choose(paths: Sequence[Path], batch: int, config: DistillConfig) -> list[Path]:
    """Choose as many images as the updates can look at."""
    enough = -(-config.updates * batch // (config.steps * config.draws))
    order = np.random.default_rng(config.seed).permutation(len(paths))
    return [paths[i] for i in order[: max(1, enough)]]


def _walked(done: int, count: int) -> TrainStep:
    nothing = float("nan")
    return TrainStep(0, nothing, done / count, nothing, 0.0, stage="walk")


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
