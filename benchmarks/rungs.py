"""The ladder from fifty denoising steps to one: what each rung answers, in how much time.

On the same pairs, with the same number of updates: the paper's objective in fewer and fewer steps,
with two solvers; adapters trained for a few steps (grid) or one (onestep); and the paper's adapter
after it taught itself on images without targets (distilled).
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fewshot_rt.baselines import make_baselines
from fewshot_rt.bases import open_base
from fewshot_rt.cards import BOX, Card, find_card
from fewshot_rt.costs import TERA, Video, measure_pass, open_on_meta
from fewshot_rt.distill import adapter_parameters, make_lesson, student_settings, walk
from fewshot_rt.distill_config import DistillConfig
from fewshot_rt.errors import ConfigError, unknown
from fewshot_rt.evaluate import score
from fewshot_rt.images import Pixels, read_image, to_model
from fewshot_rt.predict import answer_images
from fewshot_rt.predictor import Predictor
from fewshot_rt.runs import base_predictor, make_recipe
from fewshot_rt.task import Task
from fewshot_rt.train import learn, train
from fewshot_rt.train_config import TrainConfig

from .learning import (
    Cell,
    Protocol,
    describe_cell,
    describe_training,
    make_training,
    require_cells,
    squared_error,
    write_cell,
)
from .record import Record

KIND = "steps"  # of records
ARITHMETIC = "steps-arithmetic"
LONG = 50  # the paper's
PAPER, SOLVED = "paper", "paper, dpm"
PAPER_STEPS, SOLVED_STEPS = (LONG, 16, 8, 4, 2, 1), (16, 8, 4)
GRID, DISTILLED = 4, (4, 1)
UNLABELLED = 20  # images besides those of the pairs
REFERENCE = f"{PAPER}, {LONG}"
# Frames, steps, passes in a step (guidance takes two), steps before frames are dropped.
ARITHMETIC_ROWS = (
    ("the paper's", 49, 50, 2, 50),
    ("frames dropped after 5 steps", 49, 50, 2, 5),
    ("9 frames", 9, 50, 2, 50),
    ("no guidance", 9, 50, 1, 50),
    ("8 steps", 9, 8, 1, 8),
    ("4 steps", 9, 4, 1, 4),
    ("1 step", 9, 1, 1, 1),
    ("1 step, 5 frames", 5, 1, 1, 1),
)
ARITHMETIC_BASES = ((BOX, (128, 128)), ("zai-org/CogVideoX1.5-5B-I2V", (480, 720)))


@dataclass(frozen=True)
class Answers:
    """What one rung answered, and the milliseconds that an image took."""

    steps: int
    pixels: list[Pixels]
    image_ms: float


def run_rungs(
    cells: Sequence[Cell], protocol: Protocol, *, known: Sequence[Record] = ()
) -> Iterator[tuple[Cell, Record | None]]:
    """Measure cells; those that a known record holds already are yielded without a record."""
    done = [record for record in known if record.kind == KIND]
    base = open_base(protocol.base)
    require_cells(cells, protocol, base)
    shared = {
        **{k: v for k, v in asdict(protocol).items() if k != "unet_steps"},
        "revision": base.revision,
        "training": describe_training(protocol, base),
        "distillation": vars(DistillConfig()),
        "rungs": [PAPER_STEPS, SOLVED_STEPS, DISTILLED, GRID, UNLABELLED],
        "pass_gflop": _pass_flop(protocol) / 1e9,
    }
    shared = json.loads(json.dumps(shared))  # as it comes back from a file
    with TemporaryDirectory() as folder:
        for cell in cells:
            settings = {**describe_cell(cell), "codec": cell.case.codec, **shared}
            if any((r.case, dict(r.settings)) == (cell.case.name, settings) for r in done):
                yield cell, None
                continue
            place = write_cell(cell, protocol, folder)
            variants = _measure(cell, protocol, place)
            yield (
                cell,
                Record(
                    kind=KIND,
                    case=cell.case.name,
                    images=protocol.test,
                    reference=REFERENCE,
                    variants=variants,
                    settings=settings,
                ),
            )


def measure_arithmetic() -> Record:
    """Count the arithmetic of an answer at each rung, for pocket and for CogVideoX1.5-5B."""
    variants: dict[str, dict[str, float]] = {}
    for name, frames, steps, passes, whole in ARITHMETIC_ROWS:
        variants[name] = {"frames": frames, "steps": steps, "passes": passes}
        for base, size in ARITHMETIC_BASES:
            flop = whole * measure_pass(_card(base), Video(frames=frames, size=size)).flop
            if whole < steps:  # of merged frames two at either end are left, as in 9 frames
                ends = 9 if open_on_meta(_card(base)).geometry.merged_frames > 1 else 5
                left = measure_pass(_card(base), Video(frames=ends, size=size)).flop
                flop += (steps - whole) * left
            variants[name][base] = flop * passes / TERA
    sizes = {base: list(size) for base, size in ARITHMETIC_BASES}
    return Record(
        kind=ARITHMETIC,
        case=ARITHMETIC,
        images=1,
        reference=ARITHMETIC_ROWS[0][0],
        variants=variants,
        settings={"sizes": sizes},
    )


def _card(name: str) -> Card:
    card = find_card(name)
    if card is None:
        raise ConfigError(unknown("base", name, [base for base, _ in ARITHMETIC_BASES]))
    return card


def _pass_flop(protocol: Protocol) -> int:
    """Count the arithmetic of a prediction of pocket; 0 for a base that has no card."""
    if protocol.base != BOX:
        return 0
    card = _card(BOX)
    video = Video(frames=card.transition.frames, size=(protocol.size, protocol.size))
    return measure_pass(card, video).flop


def _measure(cell: Cell, protocol: Protocol, place: Path) -> dict[str, dict[str, float]]:
    """Give the metrics, the squared error, the sharpness and the time of each rung."""
    whole = Task.load(place)
    task = whole.shots(cell.shots, cell.seed)
    pairs = whole.split("test").pairs
    images = [read_image(pair.source) for pair in pairs]
    targets = [read_image(pair.target) for pair in pairs]
    variants: dict[str, dict[str, float]] = {}

    def add(name: str, answers: list[Pixels], **more: float) -> None:
        mean, _ = score(answers, targets, codec=task.codec, names=task.metrics)
        variants[name] = mean | {"error": squared_error(answers, targets, task.codec), **more}

    inputs = [pair.source for pair in whole.split("train").pairs]
    for name, answers in _climb(cell, protocol, task, place, images, inputs):
        add(name, answers.pixels, steps=answers.steps, image_ms=answers.image_ms)
    size = (protocol.size, protocol.size)
    for name, baseline in make_baselines(task.pairs, task.codec, size=size).items():
        add(name, [baseline(image) for image in images])
    return variants


def _climb(
    cell: Cell,
    protocol: Protocol,
    task: Task,
    place: Path,
    images: list[Pixels],
    inputs: Sequence[Path],
) -> Iterator[tuple[str, Answers]]:
    """Train on each rung and answer; the paper's adapter comes first, then teaches itself.

    inputs: files of all pairs for training, of which some are taken without their targets.
    """
    base, config, predictor = _trained(cell, protocol, task, place, objective="diffusion")
    for steps in PAPER_STEPS:
        yield f"{PAPER}, {steps}", _answer(predictor, images, steps=steps, noise="seeded")
    for steps in SOLVED_STEPS:
        answers = _answer(predictor, images, steps=steps, noise="seeded", solver="dpm")
        yield f"{SOLVED}, {steps}", answers
    shown = [p.source for p in task.pairs]
    shown += [path for path in inputs if path not in shown][:UNLABELLED]
    unlabelled = [to_model(read_image(path), predictor.recipe.size) for path in shown]
    weights = {name: value.detach().clone() for name, value in adapter_parameters(base)}
    for steps in DISTILLED:
        for name, value in adapter_parameters(base):
            value.data.copy_(weights[name])
        _distill(base, predictor, unlabelled, config, seed=cell.seed, steps=steps)
        answers = _answer(predictor, images, steps=steps, noise="seeded")
        yield f"distilled, {steps}", answers
    for objective, steps, noise in (("grid", GRID, "seeded"), ("onestep", 1, "zero")):
        *_, predictor = _trained(cell, protocol, task, place, objective=objective)
        yield f"{objective}, {steps}", _answer(predictor, images, steps=steps, noise=noise)


def _trained(
    cell: Cell, protocol: Protocol, task: Task, place: Path, *, objective: str
) -> tuple[Any, TrainConfig, Predictor]:
    base: Any = open_base(protocol.base)
    base.geometry = replace(base.geometry, native=(protocol.size, protocol.size))
    config = replace(make_training(protocol), seed=cell.seed, objective=objective, grid_steps=GRID)
    recipe = make_recipe(base, task, config)
    with TemporaryDirectory() as state:
        for _ in train(base, task, config, Path(state), cache=place.parent / ".latents"):
            pass
    return base, config, base_predictor(base, recipe, base.embed(task.prompt), origin=objective)


def _distill(
    base: Any,
    predictor: Predictor,
    images: Sequence[Any],
    config: TrainConfig,
    *,
    seed: int,
    steps: int,
) -> None:
    """Let an attached adapter teach itself to answer in fewer steps."""
    chosen, prompt = DistillConfig(steps=steps, seed=seed), base.embed("")
    lesson = make_lesson(base, walk(base, images, prompt, predictor.recipe, chosen), prompt)
    settings = student_settings(config, base, chosen)
    with TemporaryDirectory() as state:
        for _ in learn(base, lesson, settings, Path(state), trainable=adapter_parameters):
            pass


def _answer(
    predictor: Predictor, images: list[Pixels], *, steps: int, noise: str, solver: str = "euler"
) -> Answers:
    """Answer batch by batch, the first one twice; the median batch counts."""
    predictor = predictor.with_recipe(steps=steps, noise=noise, solver=solver)
    batch = predictor.recipe.batch
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    answers: list[Pixels] = []
    image_ms = []
    answer_images(predictor, parts[0])
    for part in parts:
        started = time.perf_counter()
        answers += answer_images(predictor, part)
        image_ms.append(1000 * (time.perf_counter() - started) / len(part))
    return Answers(steps, answers, float(np.median(image_ms)))
