"""Windows of a model's size over a larger image, and the blend of their answers. NumPy only.

Axes: H W pixels of an image, h w pixels of a window, N windows along one axis.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .errors import ConfigError
from .images import Floats, Pixels, to_model
from .predictor import Predictor

MOST_OVERLAP = 0.75  # beyond it, every pixel would be answered more than sixteen times
Margins = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How windows cover an image at its own resolution.

    overlap: the least share of a window's side that the next one covers too, from 0 to 0.75.
    """

    overlap: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= MOST_OVERLAP:
            raise ConfigError(
                f"overlap {self.overlap:g} is no share of a window that can overlap. "
                f"Give 0 to {MOST_OVERLAP}, such as 0.25 for a quarter of its side."
            )


@dataclass(frozen=True)
class Span:
    """One window along one axis: its first pixel, and what each of its pixels weighs.

    Shapes: weights float32 [h] or [w], above 0.
    """

    start: int
    weights: Floats

    def of(self, window: int) -> slice:
        """Give the pixels that the window covers."""
        return slice(self.start, self.start + window)


def spans(length: int, window: int, *, tiling: Tiling) -> list[Span]:
    """Cover an axis with the fewest windows that overlap enough, evenly spread, none sticking out.

    A window weighs a raised cosine (Hann), divided by what all windows weigh at a pixel: the
    weights at every pixel sum to one. Those of an image are products of those of its axes, and sum
    to one as well.

    Units: length and window in pixels.
    Raises: ValueError if the window is empty or longer than the axis.
    """
    if not 1 <= window <= length:
        raise ValueError(f"a window of {window} pixels does not fit into {length}")
    stride = max(1, window - round(tiling.overlap * window))
    gaps = -(-(length - window) // stride)
    starts = [i * (length - window) // max(gaps, 1) for i in range(gaps + 1)]
    hann = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + window] += hann
    return [Span(s, (hann / total[s : s + window]).astype(np.float32)) for s in starts]


def answer_tiled(predictor: Predictor, pixels: Pixels, *, tiling: Tiling) -> Pixels:
    """Answer an image at its own resolution, by overlapping windows of the model's size.

    The answers are blended as the model gave them, in [-1, 1], and decoded once: a mask is
    thresholded after the blend. Where windows disagree about labels, the class nearest to the
    blended colour is taken. What one window shows is all that an answer can depend on.

    An image smaller than a window along an axis is continued there by its mirror image, half on
    either side, rather than scaled up: things keep the size in pixels at which the adapter knows
    them. An image of exactly the window's size gets the same bytes as without tiles.

    Only as many rows as a window has are held as floats, however large the image.

    Shapes: pixels uint8 [H, W, 3]; result uint8 [H, W] or [H, W, 3], as the codec writes it.
    Raises: ModelError if a value of an answer is not finite.
    """
    margins = _margins(pixels.shape[:2], predictor.recipe.size)
    is_smaller = any(map(any, margins))
    # Padding by nothing would copy a large image.
    canvas = np.pad(pixels, (*margins, (0, 0)), mode="symmetric") if is_smaller else pixels
    codec = predictor.recipe.codec
    rows = [
        codec.decode(band, (band.shape[1], band.shape[2]))
        for band in answer_bands(predictor, canvas, tiling=tiling)
    ]
    (top, _), (left, _) = margins
    height, width = pixels.shape[:2]
    return np.concatenate(rows)[top : top + height, left : left + width]


def answer_bands(predictor: Predictor, canvas: Pixels, *, tiling: Tiling) -> Iterator[Floats]:
    """Yield the blended answer band by band, from top to bottom, each when its last window is in.

    Shapes: canvas uint8 [H, W, 3], at least of the model's size; bands float32 [3, rows, W], which
        have H rows in all.
    Units: as the model answers, about [-1, 1].
    """
    (height, width), (h, w) = canvas.shape[:2], predictor.recipe.size
    down, across = spans(height, h, tiling=tiling), spans(width, w, tiling=tiling)
    windows = (canvas[row.of(h), column.of(w)] for row in down for column in across)
    answers = _answers(predictor, windows)
    band = np.zeros((3, h, width), np.float32)
    ends = [row.start for row in down[1:]] + [height]
    for row, end in zip(down, ends, strict=True):
        for column in across:
            weights = row.weights[:, None] * column.weights
            band[:, :, column.of(w)] += weights * next(answers)
        done = end - row.start
        yield band[:, :done]
        band = np.concatenate([band[:, done:], np.zeros((3, done, width), np.float32)], axis=1)


def _answers(predictor: Predictor, windows: Iterable[Pixels]) -> Iterator[Floats]:
    """Answer windows in full batches. Shapes: uint8 [h, w, 3] -> float32 [3, h, w]."""
    todo, recipe = iter(windows), predictor.recipe
    while batch := [to_model(window, recipe.size) for window in islice(todo, recipe.batch)]:
        yield from predictor.answer(np.stack(batch))


def _margins(size: tuple[int, ...], window: tuple[int, int]) -> Margins:
    """Give what lacks before and after along each axis of an image smaller than a window."""
    lacks = (max(0, w - n) for n, w in zip(size, window, strict=True))
    return tuple((lack // 2, lack - lack // 2) for lack in lacks)
