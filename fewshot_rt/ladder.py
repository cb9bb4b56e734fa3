"""How few steps an adapter needs: tried on pairs that it was not trained on.

An error alone would choose one step wherever many answers are right: their mean, a blur. So it is
weighed against sharpness, where answers are pictures.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .errors import DataError
from .files import write_json
from .images import Pixels, write_image
from .metrics import METRICS, error_of, measure
from .predict import answer_images
from .predictor import NOISES, Predictor

STEPS = (1, 2, 4, 8, 16)
PASSES = sum(STEPS) * len(NOISES)  # predictions of an image for the whole curve
TOLERANCE = 0.02  # of the best cost, that fewer steps may cost more
MOST_CHANCE = 0.1  # of the best cost, that counts as chance however few images there are
LEAST_ERROR = 0.01  # below which errors do not count as different
BLUR = 2.0  # how much sharpness lost weighs beside an error as large as the least
CURVE_FILE, PICTURE_FILE = "steps.json", "panels/steps.png"
SHEET, MARGIN = (720, 300), 44
COLOURS = {"zero": "royalblue", "seeded": "darkorange"}
SHARPNESS = "sharpness"


@dataclass(frozen=True)
class Rung:
    """What a number of steps gives from one kind of noise.

    scores: {metric: mean over images}. errors: of the metric to judge by, image by image; 0 is
    right. sharpness: image by image; empty where answers are no pictures. Units: milliseconds an
    image.
    """

    steps: int
    noise: str
    scores: dict[str, float]
    errors: tuple[float, ...]
    sharpness: tuple[float, ...]
    image_ms: float


def climb(
    predictor: Predictor, images: Sequence[Pixels], targets: Sequence[Pixels]
) -> Iterator[Rung]:
    """Answer images in 1, 2, 4, 8 and 16 steps, from zero and from seeded noise.

    Shapes: images uint8 [H, W, 3], targets as the codec writes them.
    """
    recipe = predictor.recipe
    judge = recipe.metrics[0]
    names = dict.fromkeys(recipe.metrics)
    if recipe.codec.name in METRICS[SHARPNESS].codecs:
        names |= {SHARPNESS: None}
    answer_images(predictor, images[: recipe.batch])  # warms up
    for steps in STEPS:
        for noise in NOISES:
            started = time.perf_counter()
            answers = answer_images(predictor.with_recipe(steps=steps, noise=noise), images)
            seconds = time.perf_counter() - started
            found = [
                measure(answer, target, codec=recipe.codec, names=names)
                for answer, target in zip(answers, targets, strict=True)
            ]
            yield Rung(
                steps,
                noise,
                {name: float(np.mean([values[name] for values in found])) for name in names},
                tuple(error_of(judge, values[judge]) for values in found),
                tuple(values[SHARPNESS] for values in found if SHARPNESS in values),
                1000 * seconds / len(images),
            )


def choose(rungs: Sequence[Rung], *, trained_noise: str) -> Rung:
    """Choose the fewest steps that cost no more than the best, but for 2 % and chance.

    The cost of an image is its error, in units of the least that was reached on it (or a quarter of
    the mean of these, if that is more), and twice the sharpness that it lacks. Chance is the
    standard error of the difference over images, and at most a tenth of the cost. Of two kinds of
    noise that are as good, the one that was trained with is chosen.
    Raises: DataError if there are no rungs.
    """
    if not rungs:
        raise DataError("nothing was tried, so that nothing can be chosen")
    least = np.min([rung.errors for rung in rungs], axis=0)
    units = np.maximum(least, max(LEAST_ERROR, float(least.mean()) / 4))
    costs = [_costs(rung, units) for rung in rungs]
    best = min(costs, key=lambda cost: float(cost.mean()))
    near = [rung for rung, cost in zip(rungs, costs, strict=True) if _is_near(cost, best)]
    return min(near, key=lambda rung: (rung.steps, rung.noise != trained_noise))


def write_curve(
    folder: Path, rungs: Sequence[Rung], *, metric: str, trained_noise: str, is_held_out: bool
) -> Rung:
    """Write what was tried into a run, with the picture of it; give what is recommended.

    Raises: DataError if the disk is full or the folder cannot be written to.
    """
    chosen = choose(rungs, trained_noise=trained_noise)
    values: dict[str, Any] = {
        "recommended_steps": chosen.steps,
        "noise": chosen.noise,
        "metric": metric,
        "images": len(chosen.errors),
        "is_held_out": is_held_out,
        "tried": [asdict(rung) for rung in rungs],
    }
    write_json(folder / CURVE_FILE, values)
    write_image(folder / PICTURE_FILE, draw_curve(rungs, chosen, metric=metric))
    return chosen


def draw_curve(rungs: Sequence[Rung], chosen: Rung, *, metric: str) -> Pixels:
    """Draw a metric, and sharpness where there is any, over the number of steps.

    Shapes: uint8 [H, W, 3].
    """
    sheet = Image.new("RGB", SHEET, "white")
    draw = ImageDraw.Draw(sheet)
    names = [metric]
    if SHARPNESS in chosen.scores and metric != SHARPNESS:
        names.append(SHARPNESS)
    width = SHEET[0] // len(names)
    for place, name in enumerate(names):
        _draw_panel(draw, rungs, chosen, name, left=place * width, width=width)
    return np.asarray(sheet)


def _costs(rung: Rung, units: NDArray[np.float64]) -> NDArray[np.float64]:
    lacking = 1 - np.array(rung.sharpness or (1.0,) * len(rung.errors))
    costs: NDArray[np.float64] = np.array(rung.errors) / units + BLUR * lacking
    return costs


def _is_near(cost: NDArray[np.float64], best: NDArray[np.float64]) -> bool:
    more = cost - best
    chance = float(more.std(ddof=1)) / len(more) ** 0.5 if len(more) > 1 else 0.0
    chance = min(chance, MOST_CHANCE * float(best.mean()))
    return float(more.mean()) <= TOLERANCE * float(best.mean()) + chance


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    rungs: Sequence[Rung],
    chosen: Rung,
    name: str,
    *,
    left: int,
    width: int,
) -> None:
    """Draw one metric: a line for each kind of noise, a ring around what is chosen."""
    box = (left + MARGIN, MARGIN, left + width - 12, SHEET[1] - MARGIN)
    values = [rung.scores[name] for rung in rungs]
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    columns = sorted({rung.steps for rung in rungs})

    def at(rung: Rung) -> tuple[float, float]:
        share = columns.index(rung.steps) / max(1, len(columns) - 1)
        across = box[0] + 14 + share * (box[2] - box[0] - 28)
        up = (rung.scores[name] - low) / spread
        return across, box[3] - 10 - up * (box[3] - box[1] - 20)

    draw.rectangle(box, outline="lightgray")
    draw.text((box[0], 12), name, fill="black")
    for number, noise in enumerate(NOISES):
        line = [at(rung) for rung in rungs if rung.noise == noise]
        draw.line(line, fill=COLOURS[noise], width=2)
        for x, y in line:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=COLOURS[noise])
        draw.text((box[0] + 110 + 90 * number, 12), f"{noise} noise", fill=COLOURS[noise])
    x, y = at(chosen)
    draw.ellipse((x - 8, y - 8, x + 8, y + 8), outline="black", width=2)
    for rung in rungs[:: len(NOISES)]:
        draw.text((at(rung)[0] - 4, box[3] + 4), str(rung.steps), fill="black")
    for value, y in ((high, box[1] + 4), (low, box[3] - 16)):
        draw.text((left + 4, y), f"{value:.3g}", fill="black")
    draw.text((box[0], box[3] + 20), "denoising steps; ring: recommended", fill="gray")
