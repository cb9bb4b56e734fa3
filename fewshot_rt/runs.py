"""Run folders: what training writes, and how a run opens as a base or as a predictor.

config.json   resolved settings, recipe and versions      task.json    the task and its pairs
adapter/      LoRA weights, as PEFT saves them            prompt.safetensors   it, embedded
bundles/      what `export` writes                        metrics.jsonl, panels/, state/, card.md
"""

import json
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FewshotError, ModelError
from .files import whole, write_json, write_text
from .predictor import Predictor, Recipe
from .versions import versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from .adapter import Adapter
    from .base import Base
    from .task import Task
    from .train_config import TrainConfig

LATEST = "latest"
HINT = "Train one: fewshot-rt train PAIRS. Or name another with --runs, or a path."
CONFIG_FILE, TASK_FILE, MANIFEST_FILE = "config.json", "task.json", "manifest.json"
PROMPT_FILE = "prompt.safetensors"
# Steps and noise that fit what was learned; seeds are those of training.
SAMPLING = {"onestep": (1, "zero"), "grid": (4, "seeded"), "diffusion": (8, "seeded")}


def make_recipe(base: "Base", task: "Task", config: "TrainConfig") -> Recipe:
    """Give the recipe that fits an adapter trained with these settings."""
    steps, noise = SAMPLING[config.objective]
    if config.objective == "grid":
        steps = config.grid_steps
    height, width = config.pixels(base.geometry.native)
    frames = task.transition.frames
    latents = base.geometry.latent_shape(frames=frames, height=height, width=width)
    return Recipe(
        task=task.name,
        codec=task.codec,
        metrics=task.metrics,
        size=(height, width),
        latent_shape=latents,
        schedule=base.schedule.at(math.prod(latents[1:])),
        steps=steps,
        noise=noise,
        trained_noise=noise,
        trained_steps=steps,
        ends=base.geometry.merged_frames,
        seed=config.seed,
        start=config.start if config.objective == "onestep" else 1.0,
        batch=base.batch,
    )


def write_run(
    folder: Path,
    *,
    base: "Base",
    config: "TrainConfig",
    task: "Task",
    recipe: Recipe,
    prompt: "Mapping[str, Tensor]",
) -> None:
    """Write what a run needs besides its adapter. prompt: the task's, as the base embeds it.

    Raises: DataError if the disk is full or the folder cannot be written to.
    """
    from safetensors.torch import save_file

    values = {
        "train": vars(config),
        "recipe": recipe.to_dict(),
        "task_digest": task.digest(),
        "base_revision": base.revision,
        "versions": versions(),
    }
    write_json(folder / CONFIG_FILE, values)
    write_json(folder / TASK_FILE, task.to_dict())
    with whole(folder / PROMPT_FILE) as temporary:
        save_file({n: v.cpu().contiguous() for n, v in prompt.items()}, temporary)


def read_run(folder: Path) -> dict[str, Any]:
    """Read the settings of a run: "train", "recipe", "task_digest", "versions", and the "task".

    Raises: ModelError if the folder is no run or its files are damaged.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"{folder} is no run: there is no {CONFIG_FILE}. {HINT}")
    try:
        values: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        values["task"] = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        values["recipe"] = Recipe.from_dict(values["recipe"])
    except (OSError, ValueError, KeyError, TypeError, FewshotError) as error:
        raise ModelError(f"the run {folder} is damaged: {error}. Train it again.") from error
    return values


def open_exact(
    folder: Path, *, device: str = "cpu", acceleration: "Sequence[str]" = ()
) -> "tuple[Base, Adapter, dict[str, Any]]":
    """Open a run's base in fp32, and its adapter beside it, for what is built of both.

    acceleration: as `open_run` has it. The run's settings are given, too; in them, "prompt" is the
    task's, embedded, and "acceleration" are the files that were added.
    Raises: ModelError if the run, its adapter, its base or such a file is missing, damaged or does
    not fit; ConfigError for a wrong scale or number of files.
    """
    from .acceleration import add_acceleration

    base, adapter, values = _open(folder, device=device, weights="fp32", acceleration=acceleration)
    add_acceleration(base, values["acceleration"])
    return base, adapter, values


def open_merged(
    folder: Path, *, acceleration: "Sequence[str]" = ()
) -> "tuple[Base, Adapter, dict[str, Any]]":
    """Do as `open_exact` on the CPU, and merge the adapter."""
    base, adapter, values = open_exact(folder, acceleration=acceleration)
    adapter.merge(base)
    return base, adapter, values


def open_attached(folder: Path, *, device: str) -> "tuple[Base, Adapter, dict[str, Any]]":
    """Open a run's base as it was trained on, with its adapter attached, to train on.

    The adapter is given and the run's settings too; "prompt" in them is the task's, embedded.
    Raises: ModelError if the run, its adapter or its base is missing, damaged or does not fit.
    """
    weights = read_run(folder)["train"].get("weights", "auto")
    base, adapter, values = _open(folder, device=device, weights=weights)
    adapter.attach(base)
    return base, adapter, values


def open_run(
    folder: Path,
    *,
    device: str = "cpu",
    weights: str | None = None,
    offload: bool = False,
    acceleration: "Sequence[str]" = (),
    drops: bool = False,
) -> Predictor:
    """Open a run as a predictor that runs in plain PyTorch.

    weights: how the base is kept, see `open_base`; by default as for training, but few bits, which
    only training needs. Where it is not in fp32, the adapter stays beside it: merged, much of a
    small update would be lost in rounding.
    acceleration: a published LoRA for each transformer of the base, FILE or FILE:SCALE, that is
    added to the weights under the adapter. drops: let frames between the first and the last be
    dropped, as the recipe's `drop_after` asks.
    Raises: ModelError if the run, its adapter, its base or such a file is missing, damaged or does
    not fit, or memory does not suffice; ConfigError for a wrong scale or number of files.
    """
    from .acceleration import add_acceleration
    from .adapter import is_exact
    from .device import enough_memory

    with enough_memory():
        base, adapter, values = _open(
            folder, device=device, weights=weights, acceleration=acceleration
        )
        with base.offloaded() if offload else nullcontext():
            add_acceleration(base, values["acceleration"])
            if is_exact(base):
                adapter.merge(base)
            else:
                adapter.attach(base)
        recipe = replace(values["recipe"], ends=base.geometry.merged_frames)
        if drops:
            transition = values["transition"]
            base.play(replace(transition, span=transition.span or transition.frames))
        return base_predictor(base, recipe, values["prompt"], origin=str(folder))


def _open(
    folder: Path, *, device: str, weights: str | None, acceleration: "Sequence[str]" = ()
) -> "tuple[Base, Adapter, dict[str, Any]]":
    """Open a run's base, its adapter and its settings; among these, the files to accelerate it."""
    from .acceleration import Acceleration
    from .adapter import Adapter
    from .bases import open_base
    from .task import Task

    values = read_run(folder)
    adapter = Adapter.load(folder)
    files = [Acceleration.parse(text) for text in acceleration]  # before the base is read
    trained = values["train"]
    # Runs of the first days do not say how.
    kept = trained.get("weights", "auto")
    if weights is None:
        weights = kept if kept in ("fp32", "bf16") else "auto"
    base = open_base(trained["base"], device=device, weights=weights, vae=trained.get("vae"))
    values["transition"] = Task.from_dict(values["task"]).transition
    base.play(values["transition"])
    values["prompt"] = _read_prompt(folder, base, values["task"]["prompt"])
    values["acceleration"] = files
    return base, adapter, values


def base_predictor(
    base: "Base", recipe: Recipe, prompt: "Mapping[str, Tensor]", *, origin: str
) -> Predictor:
    """Make a predictor of a base as it is, with whatever adapter it holds."""
    from .roles import eager_runners, make_signatures

    signatures = make_signatures(
        base,
        prompt,
        latents=recipe.latent_shape,
        size=recipe.size,
        batch=recipe.batch,
    )
    return Predictor(
        eager_runners(base, signatures),
        prompt={name: value.cpu().numpy() for name, value in prompt.items()},
        recipe=recipe,
        origin=origin,
    )


def _read_prompt(folder: Path, base: "Base", prompt: str) -> "dict[str, Tensor]":
    if not (folder / PROMPT_FILE).exists():
        return base.embed(prompt)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        embedded = load_file(folder / PROMPT_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the run {folder} is damaged: {error}. Train it again.") from error
    return {name: value.to(base.device) for name, value in embedded.items()}


def mark_latest(folder: Path) -> None:
    """Let `latest`, beside the run, point to it: a link, or a file with its name."""
    link = folder.parent / LATEST
    temporary = folder.parent / f".{LATEST}-{os.getpid()}"
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        os.replace(temporary, link)
    except OSError:
        # Windows makes links for some users only, and replaces none.
        temporary.unlink(missing_ok=True)
        write_text(link, folder.name + "\n")


def latest_run(runs: Path) -> Path:
    """Find the run that was trained last.

    Raises: ModelError if there is none.
    """
    link = runs / LATEST
    name = link.read_text(encoding="utf-8").strip() if link.is_file() else LATEST
    if not (runs / name / CONFIG_FILE).is_file():
        raise ModelError(f"there is no trained run in {runs}. {HINT}")
    return (runs / name).resolve()


def newest_run(runs: Path) -> Path:
    """Find the run that was begun or went on last, finished or not.

    Raises: ModelError if there is none.
    """
    begun = [path for path in runs.glob(f"*/{CONFIG_FILE}") if path.parent.name != LATEST]
    if not begun:
        raise ModelError(f"there is no run in {runs}. {HINT}")
    return max(begun, key=_age).parent


def newest_model(run: Path) -> Path:
    """Give the bundle of a run that was written last, or the run itself if it has none newer."""
    manifests = [bundle / MANIFEST_FILE for bundle in bundles_of(run)]
    trained = run / "adapter" / "adapter_model.safetensors"
    newer = [p for p in manifests if not trained.exists() or _age(p) >= _age(trained)]
    return max(newer, key=_age).parent if newer else run


def bundles_of(run: Path) -> list[Path]:
    """List the bundles of a run by name, without those that are being written."""
    folders = (manifest.parent for manifest in run.glob(f"bundles/*/{MANIFEST_FILE}"))
    return sorted(folder for folder in folders if not folder.name.startswith("."))


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns
