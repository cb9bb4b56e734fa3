"""From a folder of pairs to a run folder: what `fewshot-rt train` does, as a generator."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch

from .adapter import Adapter, snapshot
from .augment import Augmentation
from .base import Base
from .bases import open_base
from .config import make
from .errors import ModelError
from .evaluate import write_panel
from .files import write_text
from .images import read_image
from .predict import answer_image
from .predictor import Predictor
from .runs import base_predictor, make_recipe, mark_latest, open_run, read_run, write_run
from .task import Task
from .train import STATE_FILE, TrainStep, make_provenance, train
from .train_config import TrainConfig

PANELS = 4  # written on the way, besides the one before the first step
PANEL_ROWS = 4
TRIAL_STEPS = 4
# Merging adds the update to the weights, attaching adds it to the output: arithmetic may differ.
RELOAD_TOLERANCE = 1e-4


def fit(
    pairs: Path, folder: Path, config: TrainConfig, *, overwrite: bool = False
) -> Iterator[TrainStep]:
    """Train an adapter in a run folder and leave the run ready to predict and to export.

    A folder that holds a saved state goes on from it, and its settings must be the same; to
    overwrite, the folder is emptied once pairs, settings and base have proved good. The adapter is
    reloaded into a fresh base at the end: it must load whole and change the output.
    Raises: DataError, ConfigError, ModelError.
    """
    task = Task.load(pairs)
    shots = config.shots or len(task.split("train").pairs)
    chosen = task.shots(shots, config.seed)
    config = replace(config, shots=shots, device=pick_device(config.device))
    Augmentation.parse(config.augment, codec=task.codec.name)  # before anything is written
    base = open_base(config.base, device=config.device)
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    if (folder / STATE_FILE).is_file():
        require_same(folder, chosen, config)
    recipe = make_recipe(base, task, config)
    write_run(folder, config=config, task=chosen, recipe=recipe)
    shown = _Shown(folder, task, base_predictor(base, recipe, task.prompt, origin=str(folder)))
    with (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1) as log:
        steps = train(base, chosen, config, folder, cache=folder.parent / ".cache")
        for step in steps:
            if step.gradient_norm:
                log.write(json.dumps(asdict(step)) + "\n")
            shown.at(step)
            yield step
    provenance = make_provenance(base, chosen, config, steps=step.step)
    snapshot(base, provenance).save(folder)
    shown.write(step.step)
    require_effect(folder, base, shown.predictor)
    write_text(folder / "card.md", _card(folder, chosen, config, step))
    mark_latest(folder)


def estimate(task: Task, config: TrainConfig) -> dict[str, float]:
    """Try a few steps and tell what the whole training will take here: seconds, memory_gb.

    Raises: ConfigError, ModelError.
    """
    pairs = config.shots or len(task.split("train").pairs)
    config = replace(config, device=pick_device(config.device))
    trial = replace(config, steps=TRIAL_STEPS, variants=1, minutes=None)
    base = open_base(config.base, device=config.device)
    kinds = Augmentation.parse(config.augment, codec=task.codec.name).kinds
    clips = pairs * (config.variants if kinds else 1)
    with TemporaryDirectory() as folder:
        marks = [time.monotonic()]
        chosen = task.shots(min(pairs, TRIAL_STEPS), config.seed)
        steps = train(base, chosen, trial, Path(folder), cache=Path(folder))
        marks.extend(time.monotonic() for _ in steps)
    encoding = (marks[1] - marks[0]) / len(chosen.pairs) * clips
    # The first update also warms up; the last is like all that follow.
    seconds = encoding + (marks[-1] - marks[-2]) * config.steps
    if config.minutes:
        seconds = min(seconds, encoding + 60 * config.minutes)
    return {"seconds": seconds, "memory_gb": psutil.Process().memory_info().rss / 1e9}


def pick_device(device: str) -> str:
    """Choose cuda where there is one, for "auto".

    Raises: ModelError if cuda is asked for and not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError("device 'cuda' is asked for, but PyTorch finds none. Use --device cpu.")
    return device


def require_same(folder: Path, task: Task, config: TrainConfig) -> None:
    """Require that a run to go on with was begun on the same pairs with the same settings.

    Raises: ModelError that names what differs.
    """
    values = read_run(folder)
    before = make(TrainConfig, values["train"])
    # How long and how often may change between the parts of a run.
    free = {"steps", "minutes", "save_seconds", "device"}
    differing = [k for k, v in vars(before).items() if k not in free and v != getattr(config, k)]
    if values["task_digest"] != task.digest():
        differing.append("the pairs")
    if differing:
        raise ModelError(
            f"{folder} was begun with other settings: {', '.join(differing)}. Use those, or "
            "another --name, or --overwrite."
        )


def require_effect(folder: Path, base: Base, trained: Predictor) -> None:
    """Reload a saved run: its adapter must load whole, change the output, and answer as trained.

    Raises: ModelError if it does not.
    """
    height, width = trained.recipe.size
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, height, width)).astype(np.float32)
    expected = trained.answer(image)
    found = open_run(folder, device=str(base.device)).answer(image)
    values = read_run(folder)
    bare_base = open_base(values["train"]["base"], device=str(base.device))
    bare = base_predictor(
        bare_base, trained.recipe, values["task"]["prompt"], origin="without adapter"
    )
    if np.array_equal(bare.answer(image), found):
        raise ModelError("the adapter does not change the output: it was saved without effect.")
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error <= RELOAD_TOLERANCE:
        raise ModelError(f"the saved adapter answers otherwise than the trained one ({error:.1e}).")


class _Shown:
    """Panels of the same few pairs, from step 0 on: held-out ones where there are any."""

    def __init__(self, folder: Path, task: Task, predictor: Predictor) -> None:
        self.folder, self.predictor = folder, predictor
        pairs = (task.split("test").pairs or task.pairs)[:PANEL_ROWS]
        self.images = [read_image(pair.source) for pair in pairs]
        self.targets = [read_image(pair.target) for pair in pairs]
        self.next = 0.0

    def at(self, step: TrainStep) -> None:
        """Write a panel when one is due."""
        if step.progress >= self.next:
            self.next = step.progress + 1 / PANELS
            self.write(step.step)

    def write(self, step: int) -> None:
        answers = [answer_image(self.predictor, image) for image in self.images]
        path = self.folder / "panels" / f"{step:06d}.png"
        write_panel(path, self.images, answers, self.targets, rows=PANEL_ROWS)


def _card(folder: Path, task: Task, config: TrainConfig, last: TrainStep) -> str:
    adapter = Adapter.load(folder)
    origin = adapter.provenance
    return f"""---
base_model: {origin.base}
library_name: peft
tags: [few-shot, image-to-image, fewshot-rt]
---

# {task.name}

A LoRA adapter for `{origin.base}` (revision {origin.revision}), trained by `fewshot-rt train` on
{origin.shots} pairs: {origin.steps} steps of the `{origin.objective}` objective, rank
{config.rank}, seed {origin.seed}. Last loss {last.loss:.4f}.

- Answers are of kind `{task.codec.name}`; judged by {", ".join(task.metrics)}.
- Use: `fewshot-rt predict IMAGES --model {folder.name}`; or, with diffusers,
  `load_lora_weights` on this folder.
- Versions: {", ".join(f"{k} {v}" for k, v in origin.versions.items())}.
"""
