"""From a folder of pairs to a run folder: what `fewshot-rt train` does, as a generator."""

import gc
import json
import math
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from torch import Tensor

from .adapter import Provenance, snapshot
from .base import Base
from .bases import open_base
from .config import make
from .device import enough_memory, pick_device
from .errors import ModelError
from .evaluate import write_panel
from .files import reported, write_json, write_text
from .images import Floats, read_image
from .ladder import PASSES, STEPS, Rung, climb, write_curve
from .latents import embed_prompt
from .objectives import choose_loss
from .parallel import join, leave, own_rank
from .predict import answer_images
from .predictor import NOISES, Predictor, Recipe
from .runs import (
    CONFIG_FILE,
    base_predictor,
    make_recipe,
    mark_latest,
    open_run,
    read_run,
    write_run,
)
from .task import Pair, Task
from .train import (
    STATE_FILE,
    TrainStep,
    encode_pairs,
    make_provenance,
    parse_augmentation,
    train,
)
from .train_config import TrainConfig
from .trial import Trial, plan_trial

PANELS = 4  # written on the way, besides the one before the first step
PANEL_ROWS = 4
TRIAL_STEPS = 4
TRIAL = "trial"  # folder of an adapter that is only tried
# Merging adds the update to the weights, attaching adds it to the output: arithmetic may differ.
RELOAD_TOLERANCE = 1e-4
# Layers of int8 treat large activations apart, by a threshold: measured, 8e-3 and 1.3e-2.
INT8_TOLERANCE = 0.05


def fit(
    pairs: Path, folder: Path, config: TrainConfig, *, overwrite: bool = False
) -> Iterator[TrainStep]:
    """Train an adapter in a run folder and leave the run ready to predict and to export.

    A folder that holds a saved state goes on from it, and its settings must be the same; to
    overwrite, the folder is emptied once pairs, settings and base have proved good. The adapter is
    reloaded into a fresh base at the end: it must load whole and change the output. Then numbers of
    denoising steps are tried, which yields steps of other stages than "train". Under torchrun
    (or `accelerate launch`) every process trains on its own GPU, all step as one, and the run is
    that of the first.
    Raises: DataError, ConfigError, ModelError.
    """
    config = replace(config, device=pick_device(config.device))
    rank, _ = join(config.device)
    try:
        with enough_memory(), TemporaryDirectory() as other:
            if rank == 0:
                yield from _fit(pairs, folder, config, overwrite=overwrite)
                return
            own = Path(other) / "runs" / folder.name
            yield from _fit(pairs, own, config, begun=None if overwrite else folder)
    finally:
        leave()


def _fit(
    pairs: Path,
    folder: Path,
    config: TrainConfig,
    *,
    overwrite: bool = False,
    begun: Path | None = None,
) -> Iterator[TrainStep]:
    """Train as one process of `fit`. begun: the run to go on with, if not in the folder."""
    begun = begun or folder
    task = Task.load(pairs)
    config = _settled(config, task)
    chosen = task.shots(config.shots or 0, config.seed)
    parse_augmentation(config, chosen)  # before anything is written
    trial = plan_trial(task, chosen, config.hold_out)
    base = open_chosen(config)
    task, chosen = (each.played(base.transition) for each in (task, trial.learned))
    base.play(task.transition)
    config = replace(config, **vars(config.suited(base.suited)))
    choose_loss(config, base)  # settings that do not fit are found before anything is removed
    if overwrite:
        remove_run(folder, keep=pairs)
    if (begun / STATE_FILE).is_file():
        require_same(begun, chosen, config, revision=base.revision)
    recipe = make_recipe(base, task, config)
    cache = folder.parent / ".cache"
    # One large network after the other: text encoder, autoencoder, denoiser.
    prompt = embed_prompt(base, task.prompt, cache=cache)
    encode_pairs(base, chosen, config, cache=cache)
    write_run(folder, base=base, config=config, task=chosen, recipe=recipe, prompt=prompt)
    pairs_shown = trial.tried or task.pairs
    shown = _Shown(folder, pairs_shown, base_predictor(base, recipe, prompt, origin=str(folder)))
    bare = shown.predictor.answer(probe(shown.predictor))
    log = folder / "metrics.jsonl"
    for step in train(base, chosen, config, folder, cache=cache, begun=begun):
        if step.gradient_norm:
            _append(log, step)
        else:
            _keep_until(log, step.step)
        shown.at(step)
        base.rest()
        yield step
    provenance = make_provenance(base, chosen, config, steps=step.step)
    snapshot(base, provenance).save(folder)
    shown.write(step.step)
    trained = shown.predictor.answer(probe(shown.predictor))
    rungs = [] if trial.apart else (yield from _try(shown.predictor, trial))
    del shown, base  # a base is opened anew, and both may not fit a GPU
    gc.collect()
    require_effect(folder, bare, trained, config)
    if trial.apart:
        rungs = yield from _try_apart(folder, trial, config, recipe, prompt, begun=begun)
    if rungs:
        _recommend(folder, rungs, trial)
    write_text(folder / "card.md", _card(provenance, log, chosen, config))
    mark_latest(folder)


def _try(predictor: Predictor, trial: Trial) -> Generator[TrainStep, None, list[Rung]]:
    """Try numbers of steps on a trial's pairs; one process is enough."""
    rungs: list[Rung] = []
    if trial.tried and own_rank() == 0:
        images = [read_image(pair.source) for pair in trial.tried]
        targets = [read_image(pair.target) for pair in trial.tried]
        for rung in climb(predictor, images, targets):
            rungs.append(rung)
            share = len(rungs) / (len(STEPS) * len(NOISES))
            yield TrainStep(rung.steps, math.nan, share, math.nan, 0.0, stage="try")
    return rungs


def _try_apart(
    folder: Path,
    trial: Trial,
    config: TrainConfig,
    recipe: Recipe,
    prompt: Mapping[str, Tensor],
    *,
    begun: Path,
) -> Generator[TrainStep, None, list[Rung]]:
    """Train another adapter on fewer pairs, try it, and let it go."""
    gc.collect()
    base = open_chosen(config)
    task = (trial.apart or trial.learned).played(base.transition)
    base.play(task.transition)
    place = folder / TRIAL
    steps = train(base, task, config, place, cache=folder.parent / ".cache", begun=begun / TRIAL)
    for step in steps:
        yield replace(step, stage="trial")
        base.rest()
    rungs = yield from _try(base_predictor(base, recipe, prompt, origin=str(place)), trial)
    with reported(place):
        shutil.rmtree(place)
    return rungs


def _recommend(folder: Path, rungs: Sequence[Rung], trial: Trial) -> None:
    """Write what was tried into a run, and let it answer so."""
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    recipe = values["recipe"]
    chosen = write_curve(
        folder,
        rungs,
        metric=recipe["metrics"][0],
        trained_noise=recipe["trained_noise"],
        is_held_out=trial.is_held_out,
    )
    values["recipe"] |= {"steps": chosen.steps, "noise": chosen.noise}
    write_json(folder / CONFIG_FILE, values)


def estimate(task: Task, config: TrainConfig) -> dict[str, float]:
    """Try a few steps and tell what the whole training will take here: seconds, memory_gb.

    Raises: ConfigError, ModelError.
    """
    available = len(task.split("train").pairs)
    pairs = available if config.shots is None else min(config.shots, available)
    trial = plan_trial(task, task.shots(pairs, config.seed), config.hold_out)
    pairs = len(trial.learned.pairs)
    config = replace(config, device=pick_device(config.device))
    short = replace(config, steps=TRIAL_STEPS, variants=1, minutes=None)
    base = open_chosen(config)
    task = task.played(base.transition)
    base.play(task.transition)
    kinds = parse_augmentation(config, task.split("train")).kinds
    clips = pairs * (config.variants if kinds else 1)
    with enough_memory(), TemporaryDirectory() as folder:
        marks = [time.monotonic()]
        chosen = task.shots(min(pairs, TRIAL_STEPS), config.seed)
        steps = train(base, chosen, short, Path(folder), cache=Path(folder))
        marks.extend(time.monotonic() for _ in steps)
    encoding = (marks[1] - marks[0]) / len(chosen.pairs) * clips
    # The first update also warms up; the last is like all that follow.
    update = marks[-1] - marks[-2]
    seconds = encoding + update * config.steps
    if config.minutes:
        seconds = min(seconds, encoding + 60 * config.minutes)
    if trial.apart:
        seconds *= 2
    # A pass forward is about a third of an update of one clip.
    seconds += len(trial.tried) * PASSES * update / (3 * config.suited(base.suited).batch)
    return {"seconds": seconds, "memory_gb": psutil.Process().memory_info().rss / 1e9}


def open_chosen(config: TrainConfig) -> Base:
    """Open the base that settings name, as they say."""
    return open_base(config.base, device=config.device, weights=config.weights, vae=config.vae)


def _settled(config: TrainConfig, task: Task) -> TrainConfig:
    """Give settings that say how many pairs, and whose paths hold from any other folder."""
    shots = len(task.split("train").pairs) if config.shots is None else config.shots
    vae = config.vae and str(Path(config.vae).resolve())
    return replace(config, shots=shots, base=settled(config.base), vae=vae)


def settled(base: str) -> str:
    """Give a base's folder as a path that holds from any other folder; a name as it is."""
    return str(Path(base).resolve()) if (Path(base) / "model_index.json").is_file() else base


def remove_run(folder: Path, *, keep: Path) -> None:
    """Remove a run that is to be replaced, and nothing else.

    Raises: ModelError if the folder is no run, or holds the pairs; DataError if it stays.
    """
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"{folder} is no run and is not replaced. Take another --name.")
    if folder.resolve() in (keep.resolve(), *keep.resolve().parents):
        raise ModelError(f"{folder} holds the pairs and is not replaced. Take another --name.")
    with reported(folder):
        shutil.rmtree(folder)


def require_same(folder: Path, task: Task, config: TrainConfig, *, revision: str) -> None:
    """Require that a run to go on with was begun on the same pairs with the same settings.

    Raises: ModelError that names what differs.
    """
    values = read_run(folder)
    if "distilled" in values:
        raise ModelError(f"{folder} was made by distillation: go on with fewshot-rt distill.")
    # Before pairs were held out, none were.
    before = make(TrainConfig, {"hold_out": 0, **values["train"]})
    # How long and how often may change between the parts of a run.
    free = {"steps", "minutes", "save_seconds", "device", "checkpointing"}
    differing = [k for k, v in vars(before).items() if k not in free and v != getattr(config, k)]
    if values["task_digest"] != task.digest():
        differing.append("the pairs")
    if values["base_revision"] != revision:
        differing.append("the revision of the base")
    if differing:
        raise ModelError(
            f"{folder} was begun with other settings: {', '.join(differing)}. Use those, or "
            "another --name, or --overwrite."
        )


def require_effect(folder: Path, bare: Floats, trained: Floats, config: TrainConfig) -> None:
    """Reload a saved run: its adapter must load whole, change the output, and answer as trained.

    bare, trained: what was answered to `probe` without the adapter, and with it.
    Raises: ModelError if it does not.
    """
    again = open_run(folder, device=config.device, weights=config.weights)
    found = again.answer(probe(again))
    if np.array_equal(bare, found):
        raise ModelError("the adapter does not change the output: it was saved without effect.")
    error = float(np.linalg.norm(found - trained) / np.linalg.norm(trained))
    if not error <= (INT8_TOLERANCE if config.weights == "int8" else RELOAD_TOLERANCE):
        raise ModelError(f"the saved adapter answers otherwise than the trained one ({error:.1e}).")


def probe(predictor: Predictor) -> Floats:
    """Draw an image to compare answers on. Shapes: [1, 3, H, W] at the recipe's size."""
    shape = (1, 3, *predictor.recipe.size)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


class _Shown:
    """Panels of the same few pairs, from step 0 on: held-out ones where there are any."""

    def __init__(self, folder: Path, pairs: Sequence[Pair], predictor: Predictor) -> None:
        self.folder, self.predictor = folder, predictor
        pairs = pairs[:PANEL_ROWS]
        self.images = [read_image(pair.source) for pair in pairs]
        self.targets = [read_image(pair.target) for pair in pairs]
        self.next = 0.0

    def at(self, step: TrainStep) -> None:
        """Write a panel when one is due."""
        if step.progress >= self.next:
            self.next = step.progress + 1 / PANELS
            self.write(step.step)

    def write(self, step: int) -> None:
        answers = answer_images(self.predictor, self.images)
        path = self.folder / "panels" / f"{step:06d}.png"
        write_panel(path, self.images, answers, self.targets, rows=PANEL_ROWS)


def _append(log: Path, step: TrainStep) -> None:
    with reported(log), log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(step)) + "\n")


def _keep_until(log: Path, step: int) -> None:
    """Keep the first lines of a log: those after the state that a run goes on from come again."""
    if log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(log, "".join(lines[:step]))


def _card(origin: Provenance, log: Path, task: Task, config: TrainConfig) -> str:
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return f"""---
base_model: {origin.base}
library_name: peft
tags: [few-shot, image-to-image, fewshot-rt]
---

# {task.name}

A LoRA adapter for `{origin.base}` (revision {origin.revision}), trained by `fewshot-rt train` on
{origin.shots} pairs: {origin.steps} steps of the `{origin.objective}` objective, rank
{config.rank}, seed {origin.seed}. Last loss {last["loss"]:.4f}.

- Answers are of kind `{task.codec.name}`; judged by {", ".join(task.metrics)}.
- Use: `fewshot-rt predict IMAGES --model {log.parent.name}`; or, with diffusers,
  `load_lora_weights` on this folder.
- Versions: {", ".join(f"{k} {v}" for k, v in origin.versions.items())}.
"""
