"""How near an answer is to its target. NumPy alone.

Every function takes the values of one answer and its target as `Codec.values` gives them, and gives
one number. Axes: H W pixels, C channels.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codecs import Codec
from .errors import ConfigError, unknown
from .images import Pixels

Values = NDArray[Any]

SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
MOST_PSNR = 100.0
LEAST_CONTRAST = 1 / 255  # below it, an image counts as even


@dataclass(frozen=True)
class Metric:
    """One metric: its function of (answer, target), its better end, the codecs it fits."""

    function: Callable[[Values, Values], float]
    higher_is_better: bool
    codecs: tuple[str, ...]


def iou(answer: Values, target: Values) -> float:
    """Give intersection over union (Jaccard); 1 if both are empty. Shapes: bool [H, W]."""
    union = np.count_nonzero(answer | target)
    return float(np.count_nonzero(answer & target) / union) if union else 1.0


def dice(answer: Values, target: Values) -> float:
    """Give twice the intersection over the sum (F1); 1 if both are empty. Shapes: bool [H, W]."""
    total = np.count_nonzero(answer) + np.count_nonzero(target)
    return float(2 * np.count_nonzero(answer & target) / total) if total else 1.0


def pixel_accuracy(answer: Values, target: Values) -> float:
    """Give the share of pixels of the right class. Shapes: bool or int [H, W]."""
    return float(np.mean(answer == target))


def mean_iou(answer: Values, target: Values) -> float:
    """Give the mean IoU over the classes that either of the two has. Shapes: int [H, W]."""
    classes = np.union1d(answer, target)
    return float(np.mean([iou(answer == c, target == c) for c in classes]))


def mae(answer: Values, target: Values) -> float:
    """Give the mean absolute error; 1 is black against white. Shapes: [H, W] or [H, W, C]."""
    return float(np.mean(np.abs(answer.astype(np.float64) - target)))


def psnr(answer: Values, target: Values) -> float:
    """Give the peak signal-to-noise ratio, at most 100 (equal images), so that means stay finite.

    Shapes: [H, W] or [H, W, C] in [0, 1]. Units: dB.
    """
    error = float(np.mean(np.square(answer.astype(np.float64) - target)))
    return min(MOST_PSNR, -10 * math.log10(error)) if error else MOST_PSNR


def ssim(answer: Values, target: Values) -> float:
    """Give the structural similarity: Gaussian window of 11x11, sigma 1.5, channels averaged.

    Only whole windows count, but an image with a side under 11 is mirrored at its border.

    Shapes: [H, W] or [H, W, C] in [0, 1].
    Source: Wang et al. 2004, eq. 13-16, with K1 = 0.01, K2 = 0.03.
    """
    x, y = answer.astype(np.float64), target.astype(np.float64)
    if min(x.shape[:2]) <= 2 * SSIM_RADIUS:
        border = ((SSIM_RADIUS, SSIM_RADIUS),) * 2 + ((0, 0),) * (x.ndim - 2)
        x, y = np.pad(x, border, mode="symmetric"), np.pad(y, border, mode="symmetric")
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
    return float(
        np.mean(likeness / ((mean_x**2 + mean_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2)))
    )


def _blur(image: Values) -> Values:
    """Weigh every whole 11x11 window. Shapes: [H, W, ...] -> [H - 10, W - 10, ...]."""
    weights = np.exp(-0.5 * (np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        length = image.shape[axis] - 2 * SSIM_RADIUS
        parts = (
            weight * np.take(image, range(shift, shift + length), axis=axis)
            for shift, weight in enumerate(weights)
        )
        image = np.sum(np.stack(list(parts)), axis=0)
    return image


def sharpness(answer: Values, target: Values) -> float:
    """Give how far the detail of an answer is as strong as that of its target: 1, less if blurred.

    Contrast is taken band by band, an octave each, in lightness and two differences of colours, and
    summed; what only one of the two images has is lost or false. Places do not matter.
    Shapes: [H, W] or [H, W, 3] in [0, 1].
    Source: bands as in Burt & Adelson 1983, of means over 2 x 2; min over max, Ruzicka 1958.
    """
    bands = np.array(
        [[c for plane in _opponents(v) for c in _contrasts(plane)] for v in (answer, target)]
    )
    most = float(bands.max(axis=0).sum()) if bands.size else 0.0
    return float(bands.min(axis=0).sum()) / most if most > LEAST_CONTRAST else 1.0


def _opponents(image: Values) -> list[Values]:
    """Give lightness, and red and blue against it where there are colours. Shapes: [H, W] each."""
    values = image.astype(np.float64)
    if values.ndim == 2:
        return [values]
    lightness = values @ np.array([0.299, 0.587, 0.114])
    return [lightness, values[..., 0] - lightness, values[..., 2] - lightness]


def _contrasts(plane: Values) -> list[float]:
    """Give the standard deviation of each octave, finest first; what is left is no detail."""
    found = []
    while min(plane.shape) >= 4:
        height, width = (side - side % 2 for side in plane.shape)
        blocks = plane[:height, :width].reshape(height // 2, 2, width // 2, 2)
        coarse = blocks.mean(axis=(1, 3))
        found.append(float((blocks - coarse[:, None, :, None]).std()))
        plane = coarse
    return found


METRICS = {
    "iou": Metric(iou, True, ("mask",)),
    "dice": Metric(dice, True, ("mask",)),
    "pixel_accuracy": Metric(pixel_accuracy, True, ("mask", "labels")),
    "mean_iou": Metric(mean_iou, True, ("labels",)),
    "mae": Metric(mae, False, ("rgb", "gray")),
    "psnr": Metric(psnr, True, ("rgb", "gray")),
    "ssim": Metric(ssim, True, ("rgb", "gray")),
    "sharpness": Metric(sharpness, True, ("rgb", "gray")),
}


def error_of(name: str, value: float) -> float:
    """Turn a metric's value into an error, 0 if all is right; of psnr, the root of the mean square.

    Raises: ConfigError if there is no such metric.
    """
    if name not in METRICS:
        raise ConfigError(unknown("metric", name, METRICS))
    if name == "psnr":
        return float(10 ** (-value / 20))
    return 1 - value if METRICS[name].higher_is_better else value


def default_metrics(codec: str) -> tuple[str, ...]:
    """List the metrics that fit a codec, the one to judge by first."""
    first = {"mask": "iou", "labels": "mean_iou", "gray": "psnr", "rgb": "psnr"}[codec]
    others = (name for name in METRICS if codec in METRICS[name].codecs and name != first)
    return (first, *others)


def check_metrics(names: Iterable[str], codec: str) -> tuple[str, ...]:
    """Require that metrics exist and fit a codec.

    Raises: ConfigError with the nearest name, or with those that fit.
    """
    names = tuple(str(name) for name in names)
    for name in names:
        if name not in METRICS:
            raise ConfigError(unknown("metric", name, METRICS))
        if codec not in METRICS[name].codecs:
            fitting = ", ".join(default_metrics(codec))
            raise ConfigError(f"metric {name!r} does not fit codec {codec!r}. Possible: {fitting}.")
    return names


def measure(
    answer: Pixels, target: Pixels, *, codec: Codec, names: Iterable[str]
) -> dict[str, float]:
    """Compare the file pixels of an answer and a target by the named metrics.

    Shapes: uint8 [H, W] or [H, W, 3], one size.
    Raises: ValueError if the sizes differ.
    """
    if answer.shape[:2] != target.shape[:2]:
        raise ValueError(f"answer {answer.shape[:2]} and target {target.shape[:2]} differ in size")
    values = codec.values(answer), codec.values(target)
    return {name: METRICS[name].function(*values) for name in names}
