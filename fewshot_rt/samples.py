"""Several answers to one image: their mean, and a map of where they disagree. NumPy only.

Axes: N samples, H W pixels of a file, h w pixels of a model.
"""

import numpy as np
from numpy.typing import NDArray

from .codecs import Codec
from .images import Floats, Pixels, from_model

FOLDER = "disagreement"  # of the maps, beside the answers
MOST_DEVIATION = 0.125  # of values from 0 to 1; what is above is as bright


def decode_samples(
    codec: Codec, samples: Floats, size: tuple[int, int]
) -> tuple[Pixels, NDArray[np.uint8]]:
    """Give the files of the mean answer and of the map of disagreement, at the size of the input.

    The mean is that of the samples' pixels; a mask is thresholded after it. Labels have no mean:
    each pixel takes the class for which the samples speak most (`Codec.vote`).

    The map is bright where the samples disagree: for "rgb" and "gray", by their standard deviation,
    where 255 is 0.125 or more (pixels from 0 to 1; the mean over channels); for "mask" and
    "labels", by the share of samples that differ from the answer, where 255 is all of them.

    Shapes: samples [N, 3, h, w] in about [-1, 1]; size (H, W); answer uint8 [H, W] or [H, W, 3],
        map uint8 [H, W].
    Raises: ModelError if a value is not finite.
    """
    if codec.name == "labels":
        answer = codec.vote(list(samples), size)
    else:
        answer = codec.decode(np.clip(samples, -1, 1).mean(axis=0), size)
    if codec.name in ("rgb", "gray"):
        share = _deviation(codec, samples, size) / MOST_DEVIATION
    else:
        share = _differing(codec, samples, answer)
    return answer, np.rint(255 * np.clip(share, 0, 1)).astype(np.uint8)


def _deviation(codec: Codec, samples: Floats, size: tuple[int, int]) -> Floats:
    """Give the standard deviation of pixels from 0 to 1, holding one sample at full size at a time.

    Shapes: samples [N, 3, h, w]; result [H, W].
    Source: Welford 1962.
    """
    mean: Floats = np.zeros((*size, 1 if codec.name == "gray" else 3), np.float32)
    squares = np.zeros_like(mean)
    for number, sample in enumerate(samples, start=1):
        values = (from_model(sample, size) + 1) / 2
        if codec.name == "gray":
            values = values.mean(axis=-1, keepdims=True)
        step = values - mean
        mean += step / number
        squares += step * (values - mean)
    deviation: Floats = np.sqrt(squares / len(samples)).mean(axis=-1)
    return deviation


def _differing(codec: Codec, samples: Floats, answer: Pixels) -> NDArray[np.float64]:
    """Give the share of samples whose file differs from the answer. Shapes: result [H, W]."""
    height, width = answer.shape[:2]
    count = np.zeros((height, width), np.int64)
    for sample in samples:
        is_other = codec.decode(sample, (height, width)) != answer
        count += is_other if is_other.ndim == 2 else is_other.any(axis=-1)
    return count / len(samples)
