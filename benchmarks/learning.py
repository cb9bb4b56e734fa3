"""How much is learned from how few pairs: our adapters, the same network without pretraining, and
what a user would take instead, all on the same pairs.

Axes: N images, H W pixels.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fewshot_rt.augment import Augmentation
from fewshot_rt.base import Base
from fewshot_rt.baselines import make_baselines
from fewshot_rt.bases import open_base
from fewshot_rt.codecs import Codec
from fewshot_rt.errors import ConfigError, unknown
from fewshot_rt.evaluate import score, write_panel
from fewshot_rt.images import Pixels, read_image
from fewshot_rt.predict import answer_images
from fewshot_rt.runs import base_predictor, make_recipe
from fewshot_rt.task import Task
from fewshot_rt.train import train
from fewshot_rt.train_config import TrainConfig

from .curves import KIND
from .record import Record
from .tasks import TaskCase, write_task

MOST_PAIRS = 30
# All weights at once want smaller steps than an adapter's; a third and three times as much give the
# same.
FULL_RATE = 0.001
# Settings of training that a cell has for itself, or that change nothing for pocket.
OF_A_CELL = (
    *("seed", "shots", "size", "save_seconds", "weights", "checkpointing", "vae"),
    *("grid_steps", "start", "pixel_loss", "hold_out"),
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is the same for all cells of one comparison.

    size: of images, in pixels a side. test: images to measure on. steps: updates of every training
    but the U-Net's. unet_steps: of that, with twice the batch.
    """

    base: str = "pocket"
    size: int = 128
    test: int = 16
    steps: int = 250
    unet_steps: int = 150


@dataclass(frozen=True)
class Cell:
    """One task, learned from a number of pairs, with one seed."""

    case: TaskCase
    shots: int
    seed: int


Answer = Callable[[Sequence[Pixels]], list[Pixels]]
# Takes the task with its few pairs, the cell, the protocol and a folder for files.
Method = Callable[[Task, Cell, Protocol, Path], Answer]


def run_cells(
    cells: Sequence[Cell],
    protocol: Protocol,
    *,
    methods: Sequence[str],
    known: Sequence[Record] = (),
    panels: Path | None = None,
) -> Iterator[tuple[Cell, Record | None]]:
    """Measure cells; those that a known record holds already are yielded without a record.

    panels: write input | answer | target of our adapter there.
    Raises: ConfigError for an unknown method, or a size or number that does not fit; DataError,
        ModelError.
    """
    base = open_base(protocol.base)
    for name in methods:
        if name not in METHODS:
            raise ConfigError(unknown("method", name, METHODS))
    require_cells(cells, protocol, base)
    done = [record for record in known if record.kind == KIND]
    with TemporaryDirectory() as folder:
        for cell in cells:
            settings = _settings(cell, protocol, base)
            wanted = {name for name in methods if _fits(name, cell.case.codec)}
            if any(
                (record.case, dict(record.settings)) == (cell.case.name, settings)
                and wanted <= set(record.variants)
                for record in done
            ):
                yield cell, None
                continue
            variants = _measure(cell, protocol, methods, write_cell(cell, protocol, folder), panels)
            yield (
                cell,
                Record(
                    kind=KIND,
                    case=cell.case.name,
                    images=protocol.test,
                    reference=methods[0],
                    variants=variants,
                    settings=settings,
                ),
            )


def _settings(cell: Cell, protocol: Protocol, base: Base) -> dict[str, Any]:
    """Give what a record says of its cell: what is its own, then what one comparison shares."""
    return {
        **describe_cell(cell),
        **asdict(protocol),
        "revision": base.revision,
        "training": describe_training(protocol, base),
        "full_rate": FULL_RATE,
    }


def describe_cell(cell: Cell) -> dict[str, Any]:
    """Give what is a cell's own."""
    case = cell.case
    own = {"group": case.group, "moves": case.moves, "metric": case.metric}
    return own | {"shots": cell.shots, "seed": cell.seed}


def describe_training(protocol: Protocol, base: Base) -> dict[str, Any]:
    """Give the settings of training that all cells share."""
    settings = vars(make_training(protocol)) | vars(base.suited)
    settings |= {"layers": list(base.lora_targets)}
    return {name: value for name, value in settings.items() if name not in OF_A_CELL}


def write_cell(cell: Cell, protocol: Protocol, folder: str) -> Path:
    """Write the pairs of a cell's task and seed, all that any number takes, once."""
    place = Path(folder) / f"{cell.case.name}-{cell.seed}"
    if not place.exists():
        train = min(MOST_PAIRS, cell.case.most)
        sizes = {"train": train, "test": protocol.test, "size": protocol.size}
        write_task(cell.case, place, **sizes, seed=cell.seed)
    return place


def require_cells(cells: Sequence[Cell], protocol: Protocol, base: Base) -> None:
    """Find what is wrong before hours are spent.

    Raises: ConfigError if a size or a number of pairs does not fit.
    """
    multiple = base.geometry.multiple
    if protocol.size < multiple or protocol.size % multiple:
        raise ConfigError(f"size must be a multiple of {multiple}, not {protocol.size}")
    for cell in cells:
        most = min(MOST_PAIRS, cell.case.most)
        if not 1 <= cell.shots <= most:
            raise ConfigError(
                f"{cell.shots} pairs were asked for, and {cell.case.name} has 1 to {most}"
            )


def _fits(method: str, codec: str) -> bool:
    """Say whether a method can answer: the forest gives masks only."""
    return method != "forest" or codec == "mask"


def _measure(
    cell: Cell, protocol: Protocol, methods: Sequence[str], place: Path, panels: Path | None
) -> dict[str, dict[str, float]]:
    """Give the metrics, the squared error and the seconds of learning of each method."""
    whole = Task.load(place)
    task = whole.shots(cell.shots, cell.seed)
    tested = whole.split("test").pairs
    inputs = [read_image(pair.source) for pair in tested]
    targets = [read_image(pair.target) for pair in tested]
    variants: dict[str, dict[str, float]] = {}

    def add(name: str, answers: list[Pixels], seconds: float) -> None:
        mean, _ = score(answers, targets, codec=task.codec, names=task.metrics)
        error = squared_error(answers, targets, task.codec)
        variants[name] = mean | {"error": error, "seconds": seconds}

    for name in methods:
        if not _fits(name, task.codec.name):
            continue
        started = time.monotonic()
        answer = METHODS[name](task, cell, protocol, place)
        seconds = time.monotonic() - started
        answers = answer(inputs)
        add(name, answers, seconds)
        if panels and name == methods[0]:
            write_panel(panels / f"{cell.case.name}-{cell.shots}.png", inputs, answers, targets)
    size = (protocol.size, protocol.size)
    baselines = make_baselines(task.pairs, task.codec, size=size)
    for name, baseline in baselines.items():
        add(name, [baseline(image) for image in inputs], 0.0)
    return variants


def squared_error(answers: Sequence[Pixels], targets: Sequence[Pixels], codec: Codec) -> float:
    """Give the mean squared error of pictures as the video shows them; 1 is black against white."""
    errors = [
        np.square(codec.paint(a) / 255.0 - codec.paint(t) / 255.0).mean()
        for a, t in zip(answers, targets, strict=True)
    ]
    return float(np.mean(errors))


def _network(
    task: Task,
    cell: Cell,
    protocol: Protocol,
    folder: Path,
    *,
    is_pretrained: bool,
    is_whole: bool,
) -> Answer:
    """Train our network: an adapter or all of it, from pretrained or from random weights."""
    base: Any = open_base(protocol.base)
    base.geometry = replace(base.geometry, native=(protocol.size, protocol.size))
    if not is_pretrained:
        _forget(base, cell.seed)
    config = replace(make_training(protocol), seed=cell.seed)
    if is_whole:
        config = replace(config, rate=FULL_RATE)
    recipe = make_recipe(base, task, config)
    trainable = _all_parameters if is_whole else None
    with TemporaryDirectory() as state:
        cache = folder.parent / ".latents"
        for _ in train(base, task, config, Path(state), cache=cache, trainable=trainable):
            pass
    return partial(
        answer_images, base_predictor(base, recipe, base.embed(task.prompt), origin="cell")
    )


def make_training(protocol: Protocol) -> TrainConfig:
    """Give the settings of training that a protocol has."""
    return TrainConfig(base=protocol.base, steps=protocol.steps, device="cpu")


def _forget(base: Any, seed: int) -> None:
    """Give the denoiser random weights, as it had before pretraining."""
    import torch

    from fewshot_rt.bases.pocket import draw_wave_weights

    transformer = base.denoiser().transformer
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(transformer).from_config(transformer.config)
        draw_wave_weights(fresh)
    transformer.load_state_dict(fresh.state_dict())


def _all_parameters(base: Any) -> list[tuple[str, Any]]:
    return list(base.denoiser().requires_grad_(True).named_parameters())


def _unet(task: Task, cell: Cell, protocol: Protocol, folder: Path) -> Answer:  # noqa: ARG001
    from .unet import train_unet

    pairs = list(task.load_pairs())
    net = train_unet(
        np.stack([source for source, _ in pairs]),
        np.stack([target for _, target in pairs]),
        steps=protocol.unet_steps,
        seed=cell.seed,
        augmentation=Augmentation.parse("auto", codec=task.codec.name, pairs=pairs),
    )

    def answer(images: Sequence[Pixels]) -> list[Pixels]:
        found = net.answer(np.stack(images))
        return [
            task.codec.decode(values, image.shape[:2])
            for values, image in zip(found, images, strict=True)
        ]

    return answer


def _forest(task: Task, cell: Cell, protocol: Protocol, folder: Path) -> Answer:  # noqa: ARG001
    from .forest import PixelForest

    images = [read_image(pair.source) for pair in task.pairs]
    masks = [task.codec.values(read_image(pair.target)) for pair in task.pairs]
    forest = PixelForest(seed=cell.seed).fit(np.stack(images), np.stack(masks))
    return lambda given: list(forest.predict(np.stack(given)))


METHODS: dict[str, Method] = {
    "pocket": partial(_network, is_pretrained=True, is_whole=False),
    "random adapter": partial(_network, is_pretrained=False, is_whole=False),
    "random whole": partial(_network, is_pretrained=False, is_whole=True),
    "u-net": _unet,
    "forest": _forest,
}
