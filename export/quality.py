"""What fewer bits cost on a task: its own metric, on pairs of the run, beside PyTorch in fp32.

Relative errors say how near numbers are, not whether a mask is still the same.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fewshot_rt.errors import EngineError
from fewshot_rt.images import Pixels, to_model
from fewshot_rt.metrics import error_of, measure
from fewshot_rt.predict import answer_images
from fewshot_rt.predictor import Floats, Predictor, Recipe

Pairs = Sequence[tuple[Pixels, Pixels]]  # inputs and targets as their files have them
MOST_PAIRS = 16
# By how much the mean error may grow: a twentieth of it, and 0.002 (of IoU, say). Trainings that
# differ in their seed alone differ by more (README, "Task by task").
MOST_SHARE, MOST_MORE = 0.05, 0.002


@dataclass(frozen=True)
class Quality:
    """The first metric of a task, as a mean over pairs: in PyTorch, and by an engine."""

    metric: str
    eager: float
    engine: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return asdict(self)


def judge_quality(eager: Predictor, engine: Predictor, pairs: Pairs) -> Quality:
    """Answer pairs both ways and require that the engine's answers are as good.

    Raises: EngineError as `judge_answers` does.
    """
    images = [image for image, _ in pairs]
    return judge_answers(eager, answer_images(engine, images), pairs)


def judge_answers(eager: Predictor, answers: Sequence[Pixels], pairs: Pairs) -> Quality:
    """Require that an engine's answers to pairs are as good as eager's, which are made here.

    Raises: EngineError if their error is larger by more than `MOST_SHARE` and `MOST_MORE` allow.
    """
    images, targets = [image for image, _ in pairs], [target for _, target in pairs]
    metric, codec = eager.recipe.metrics[0], eager.recipe.codec
    values, errors = [], []
    for given in (answer_images(eager, images), answers):
        measured = [
            measure(answer, target, codec=codec, names=[metric])[metric]
            for answer, target in zip(given, targets, strict=True)
        ]
        values.append(float(np.mean(measured)))
        errors.append(float(np.mean([error_of(metric, value) for value in measured])))
    # Written so that a figure which is NaN fails.
    if not errors[1] <= errors[0] * (1 + MOST_SHARE) + MOST_MORE:
        raise EngineError(
            f"answers are worse than PyTorch's: {metric} {values[1]:.4g} on {len(pairs)} pairs of "
            f"the run, and {values[0]:.4g} in PyTorch. Choose another engine or precision."
        )
    return Quality(metric, values[0], values[1], len(pairs))


def batches(recipe: Recipe, pairs: Pairs) -> Generator[Floats, None, None]:
    """Give the inputs of pairs as a model takes them, a full batch at a time.

    Shapes: [B, 3, H, W] in [-1, 1]; the last batch may be smaller.
    """
    for start in range(0, len(pairs), recipe.batch):
        images = [image for image, _ in pairs[start : start + recipe.batch]]
        yield np.stack([to_model(image, recipe.size) for image in images])


def quality_values(quality: Quality | None) -> Mapping[str, Any]:
    """Give what a manifest says of quality: nothing, if it was not judged."""
    return {"quality": quality.to_dict()} if quality else {}
