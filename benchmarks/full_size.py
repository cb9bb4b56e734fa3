"""Known bases at their full size with random weights: what one update and one answer really take.

`python -m fewshot_rt.benchmarks.full_size NAME ...` makes each base on the device, trains an
adapter for a few steps and answers an image, with the code that `train` and `predict` run. Random
weights cost what trained ones do. `--layers` and `--size` make it small, to rehearse without a GPU.
"""

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch

from fewshot_rt.cards import Card, find_card, open_empty, read_cards
from fewshot_rt.costs import GB, Video
from fewshot_rt.device import pick_device
from fewshot_rt.errors import ConfigError, FewshotError, unknown
from fewshot_rt.images import write_image
from fewshot_rt.latents import embed_prompt
from fewshot_rt.memory import measure_memory
from fewshot_rt.runs import base_predictor, make_recipe
from fewshot_rt.task import Task
from fewshot_rt.train import train
from fewshot_rt.train_config import TrainConfig

from .record import RESULTS, Record, append_record

STEPS = 4  # the first ones warm up; the fastest of the others counts
ANSWERS = 3


def measure_base(
    card: Card, *, device: str, layers: int | None, config: TrainConfig, frames: int | None
) -> Record:
    """Measure one update, one answer, and one more with blocks that are offloaded.

    layers: fewer blocks than the base has.
    Raises: ConfigError or ModelError if the size does not fit, or memory does not suffice.
    """
    weights = "bf16" if device.startswith("cuda") else "fp32"
    with torch.device(device):
        base: Any = open_empty(card, layers=layers, weights=weights)
    transition = replace(card.transition, frames=frames or card.transition.frames)
    size = config.pixels(card.native)
    with TemporaryDirectory() as folder:
        task = replace(_write_task(Path(folder), size), transition=transition)
        variants = {
            "update": _update(base, task, config, Path(folder)),
            "answer": _answer(base, task, config, Path(folder)),
        }
        with base.offloaded():
            pass  # the adapter is in place
        variants["offloaded answer"] = _answer(base, task, config, Path(folder))
    suited = config.suited(base.suited)
    video = Video(frames=transition.frames, size=size, batch=suited.batch)
    estimate = measure_memory(card, video, rank=suited.rank, checkpointing=suited.checkpointing)
    return Record(
        kind="full-size",
        case=card.name,
        images=1,
        reference="update",
        variants=variants,
        settings={
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
            "weights": weights,
            "layers": layers or card.layers,
            "size": list(size),
            "frames": transition.frames,
            **vars(suited),
        },
        floor={
            "estimated update gb": estimate["train"].total / GB,
            "estimated answer gb": estimate["predict"].total / GB,
            "estimated offloaded answer gb": estimate["offload"].total / GB,
        },
    )


def _write_task(folder: Path, size: tuple[int, int]) -> Task:
    """Write two pairs of noise, a target each, and load them."""
    rng = np.random.default_rng(0)
    for side in ("input", "target"):
        for number in range(2):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            write_image(folder / "pairs" / side / f"{number}.png", pixels)
    return Task.load(folder / "pairs")


def _update(base: Any, task: Task, config: TrainConfig, folder: Path) -> dict[str, float]:
    """Train for a few steps; give the milliseconds of one, and the memory held at most."""
    _forget_peak(base.device)
    marks = []
    for _ in train(base, task, config, folder, cache=folder / "cache"):
        _wait(base.device)
        marks.append(time.perf_counter())
    return {"ms": 1000 * float(np.diff(marks)[1:].min())} | _peak(base.device)


def _answer(base: Any, task: Task, config: TrainConfig, folder: Path) -> dict[str, float]:
    """Answer an image with the adapter attached, one at a time."""
    recipe = replace(make_recipe(base, task, config), batch=1)
    prompt = embed_prompt(base, task.prompt, cache=folder / "cache")
    predictor = base_predictor(base, recipe, prompt, origin=base.name)
    image = np.zeros((1, 3, *recipe.size), np.float32)
    _forget_peak(base.device)
    times = []
    for _ in range(ANSWERS):
        started = time.perf_counter()
        predictor.answer(image)
        times.append(time.perf_counter() - started)
    return {"ms": 1000 * min(times)} | _peak(base.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> dict[str, float]:
    """Give the most memory that was held; nothing on the CPU, where PyTorch does not tell."""
    return {"gb": torch.cuda.max_memory_allocated() / GB} if device.type == "cuda" else {}


@click.command()
@click.argument("names", nargs=-1)
@click.option("--device", default="auto", show_default=True)
@click.option("--layers", type=int, help="Fewer blocks, to rehearse.")
@click.option("--size", help="WIDTHxHEIGHT.  [default: the base's own]")
@click.option("--frames", type=int, help="[default: the base's own]")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(
    names: tuple[str, ...],
    device: str,
    layers: int | None,
    size: str | None,
    frames: int | None,
    results: Path,
) -> None:
    """Measure known bases at full size with random weights; all but pocket by default."""
    known = [card.name for card in read_cards()]
    try:
        device = pick_device(device)
        config = TrainConfig(steps=STEPS, variants=1, augment="none", size=size, device=device)
        for name in names or known[1:]:
            card = find_card(name)
            if card is None:
                raise ConfigError(unknown("base", name, known))
            record = measure_base(card, device=device, layers=layers, config=config, frames=frames)
            append_record(record, results)
            click.echo(f"{name}: {dict(record.variants)}", err=True)
    except FewshotError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
