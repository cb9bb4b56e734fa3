"""Measure a predictor on pairs, beside the baselines."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .baselines import make_baselines
from .codecs import Codec
from .errors import DataError
from .images import Pixels, montage, read_image, write_image
from .metrics import measure
from .predict import answer_images
from .predictor import Predictor
from .task import Pair, Task


@dataclass(frozen=True)
class Evaluation:
    """Metrics by who answered ("fewshot-rt" and the baselines), each as a mean over images.

    scores: {who: {metric: mean}}. spread: the same, standard deviation over images. is_held_out:
    no image was trained on.
    """

    scores: dict[str, dict[str, float]]
    spread: dict[str, dict[str, float]]
    images: int
    images_per_second: float
    is_held_out: bool


def evaluate(
    predictor: Predictor, task: Task, *, known: Sequence[Pair], panel: Path | None = None
) -> Evaluation:
    """Answer the test pairs of a task (all its pairs if it has no split) and compare.

    known: the pairs for training, from which the baselines are made; those of the task if empty.
    panel: write rows of input | answer | target there.
    Raises: DataError if there is no pair to measure on.
    """
    pairs = task.split("test").pairs or task.pairs
    if not pairs:
        raise DataError("there are no pairs to measure on")
    codec, names = predictor.recipe.codec, predictor.recipe.metrics
    images = [read_image(pair.source) for pair in pairs]
    targets = [read_image(pair.target) for pair in pairs]
    started = time.perf_counter()
    answers = {"fewshot-rt": answer_images(predictor, images)}
    seconds = time.perf_counter() - started
    learned_from = known or task.split("train").pairs
    if learned_from:
        baselines = make_baselines(learned_from, codec, size=predictor.recipe.size)
        answers |= {who: [answer(image) for image in images] for who, answer in baselines.items()}
    if panel:
        write_panel(panel, images, answers["fewshot-rt"], targets)
    scores, spread = {}, {}
    for who, given in answers.items():
        scores[who], spread[who] = score(given, targets, codec=codec, names=names)
    is_held_out = not {pair.source.resolve() for pair in pairs} & {
        pair.source.resolve() for pair in learned_from
    }
    return Evaluation(scores, spread, len(images), len(images) / seconds, is_held_out)


def score(
    answers: Sequence[Pixels], targets: Sequence[Pixels], *, codec: Codec, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Give the mean and the standard deviation of each metric over images.

    Shapes: answers, targets uint8 [H, W] or [H, W, 3], each pair of one size.
    """
    measured = [
        measure(answer, target, codec=codec, names=names)
        for answer, target in zip(answers, targets, strict=True)
    ]
    columns = {name: [values[name] for values in measured] for name in names}
    mean = {name: float(np.mean(values)) for name, values in columns.items()}
    return mean, {name: float(np.std(values)) for name, values in columns.items()}


def write_panel(
    path: Path,
    images: Sequence[Pixels],
    answers: Sequence[Pixels],
    targets: Sequence[Pixels],
    *,
    rows: int = 6,
) -> None:
    """Write a picture with evenly chosen rows of input | answer | target."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(rows, len(images))).astype(int))
    table = [[images[i], answers[i], targets[i]] for i in chosen]
    write_image(path, montage(table, headings=["input", "answer", "target"], cell=192))
