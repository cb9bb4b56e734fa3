"""What an answer must beat: the input itself, the mean target, the nearest pair, Otsu's threshold.

NumPy only. Axes: H W pixels; all images uint8 [H, W, 3] unless said otherwise.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .codecs import Codec
from .images import Pixels, to_model
from .task import Pair, load_pair

Baseline = Callable[[Pixels], Pixels]
THUMBNAIL = (32, 32)


def make_baselines(
    pairs: Sequence[Pair], codec: Codec, *, size: tuple[int, int]
) -> dict[str, Baseline]:
    """Make the baselines that fit a codec from the pairs for training.

    size: (h, w) at which mean and nearest targets are kept, before they take an image's own size.
    Each takes an image and gives an answer's file pixels, uint8 [H, W] or [H, W, 3].
    """
    loaded = [load_pair(pair, codec) for pair in pairs]
    thumbnails = np.stack([to_model(source, THUMBNAIL).ravel() for source, _ in loaded])
    targets = np.stack([to_model(target, size) for _, target in loaded])
    mean = targets.mean(axis=0)

    def copy(image: Pixels) -> Pixels:
        return codec.decode(to_model(image, size), image.shape[:2])

    def mean_target(image: Pixels) -> Pixels:
        return codec.decode(mean, image.shape[:2])

    def nearest_pair(image: Pixels) -> Pixels:
        distance = np.square(thumbnails - to_model(image, THUMBNAIL).ravel()).sum(axis=1)
        return codec.decode(targets[int(distance.argmin())], image.shape[:2])

    baselines: dict[str, Baseline] = {
        "copy": copy,
        "mean target": mean_target,
        "nearest pair": nearest_pair,
    }
    if codec.name == "mask":
        baselines["otsu"] = lambda image: codec.decode(_otsu(image), image.shape[:2])
    return baselines


def otsu_threshold(gray: Pixels) -> int:
    """Give the level that parts a histogram best: values above it are foreground.

    Shapes: gray uint8, any shape. Source: Otsu 1979.
    """
    histogram = np.bincount(gray.ravel(), minlength=256).astype(np.float64)
    weight = histogram.cumsum()
    total = (histogram * np.arange(256)).cumsum()
    rest = weight[-1] - weight
    with np.errstate(divide="ignore", invalid="ignore"):
        between = weight * rest * (total / weight - (total[-1] - total) / rest) ** 2
    return int(np.nan_to_num(between).argmax())


def _otsu(image: Pixels) -> np.ndarray:
    """Threshold an image, bright as foreground. Shapes: result [3, H, W] in {-1, 1}."""
    gray = np.rint(image.mean(axis=-1)).astype(np.uint8)
    mask = np.where(gray > otsu_threshold(gray), 1, -1).astype(np.float32)
    return np.repeat(mask[None], 3, axis=0)
