"""Answer pixels <-> task values: what a target file means, and what an answer file should hold.

Axes: H W pixels of a file, h w pixels of a model, K colours. File pixels are uint8 [H, W, 3], or
[H, W] where all three channels are one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, DataError, unknown
from .images import Floats, Pixels, from_model, resize, to_uint8, with_channels

Colour = tuple[int, int, int]
Histogram = dict[Colour, int]

CODECS = ("rgb", "gray", "mask", "labels")
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts to gray
MOST_FOUND_LABELS = 12
MOST_LABELS = 64
# A mask blurred by JPEG or resizing still has two levels, this far apart (0..255). Each level is a
# flat plain: half of all pixels lie within 2 of one, and 90 % within 1/8 of the way to the other.
# Photographs, even of low contrast, reach 0.41 and 0.92, but never both (scikit-image's).
LEVEL_DISTANCE = 64
FLAT_TOLERANCE, FLAT_SHARE = 2, 0.5
NEAR_TOLERANCE, NEAR_SHARE = 1 / 8, 0.9
# Shown for the first classes: black, white, red, cyan, green, magenta, blue, yellow.
CORNERS = (
    (0, 0, 0),
    (255, 255, 255),
    (255, 0, 0),
    (0, 255, 255),
    (0, 255, 0),
    (255, 0, 255),
    (0, 0, 255),
    (255, 255, 0),
)
# Softness of class scores, in squared distance of colours in [-1, 1].
SCORE_WIDTH = 0.5


@dataclass(frozen=True)
class Codec:
    """What the pixels of targets and answers mean.

    name: "rgb" (a picture), "gray" (one value a pixel), "mask" (background and foreground) or
        "labels" (one class a pixel).
    colours: as they stand in the files; background, foreground for "mask" (black, white if none
        are given), one to a class for "labels", none for the others.
    """

    name: str
    colours: tuple[Colour, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in CODECS:
            raise ConfigError(unknown("codec", self.name, CODECS))
        if self.name == "mask" and not self.colours:
            object.__setattr__(self, "colours", ((0, 0, 0), (255, 255, 255)))
        least, most = {"mask": (2, 2), "labels": (2, MOST_LABELS)}.get(self.name, (0, 0))
        if not least <= len(set(self.colours)) == len(self.colours) <= most:
            needed = f"{least} to {most}" if least < most else str(most)
            raise ConfigError(
                f"codec {self.name!r} takes {needed} different colours, not {list(self.colours)}."
            )

    @property
    def is_gray(self) -> bool:
        """Say whether files of answers have one channel."""
        if self.name in ("rgb", "gray"):
            return self.name == "gray"
        return all(r == g == b for r, g, b in self.colours)

    def paint(self, pixels: Pixels) -> Pixels:
        """Give a target as the video shows it.

        A mask becomes black and white, labels get colours far apart, gray has three channels.

        Shapes: pixels uint8 [H, W] or [H, W, 3]; result uint8 [H, W, 3].
        """
        pixels = with_channels(pixels)
        if self.name == "rgb":
            return pixels
        if self.name == "gray":
            return np.repeat(_luminance(pixels)[..., None], 3, axis=-1)
        return _shown(len(self.colours))[self._classes(pixels)]

    def decode(self, answer: Floats, size: tuple[int, int]) -> Pixels:
        """Give the file of an answer, at the size of the input, in the colours of the targets.

        Classes are decided after resizing: a mask by its smooth gray, labels by a score for each
        class, so outlines are smooth and no third class appears between two.

        Shapes: answer [3, h, w] in about [-1, 1]; size (H, W); result uint8 [H, W] or [H, W, 3].
        Raises: ModelError if a value is not finite.
        """
        if self.name == "labels":
            return self.vote([answer], size)
        values = from_model(answer, size)
        if self.name == "rgb":
            return to_uint8(values)
        gray = values.mean(axis=-1)
        return to_uint8(gray) if self.name == "gray" else self._file_pixels((gray > 0).astype(int))

    def vote(self, answers: Sequence[Floats], size: tuple[int, int]) -> Pixels:
        """Give the file of several answers in labels: at each pixel the class of the highest score.

        Scores are added over the answers. Blended colours could show a class that no answer has.

        Shapes: answers [3, h, w] each; size (H, W); result uint8 [H, W] or [H, W, 3].
        Raises: ModelError if a value is not finite.
        """
        first, *others = answers
        scores = _scores(first, size, len(self.colours))
        for answer in others:
            scores = scores + _scores(answer, size, len(self.colours))
        return self._file_pixels(scores.argmax(axis=0))

    def values(self, pixels: Pixels) -> NDArray[Any]:
        """Give what metrics compare.

        Shapes: pixels uint8 [H, W] or [H, W, 3]; result float32 in [0, 1] [H, W, 3] for "rgb" and
        [H, W] for "gray", bool [H, W] for "mask", int [H, W] for "labels".
        """
        pixels = with_channels(pixels)
        if self.name == "rgb":
            return np.asarray(pixels / np.float32(255))
        if self.name == "gray":
            return np.asarray(_luminance(pixels) / np.float32(255))
        classes = self._classes(pixels)
        return classes == 1 if self.name == "mask" else classes

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        colours = [list(colour) for colour in self.colours]
        return {"name": self.name, "colours": colours} if colours else {"name": self.name}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Codec":
        """Make a codec from what `to_dict` gave; a colour may be one number.

        Raises: ConfigError if a key is unknown or a colour is none.
        """
        for key in values:
            if key not in ("name", "colours"):
                raise ConfigError(unknown("key of codec", key, ("name", "colours")))
        if "name" not in values:
            raise ConfigError(f"codec has no name. Possible: {', '.join(CODECS)}.")
        return cls(values["name"], tuple(_colour(value) for value in values.get("colours", ())))

    def _classes(self, pixels: Pixels) -> NDArray[np.int64]:
        """Give each pixel the index of the nearest colour. Shapes: [H, W, 3] -> [H, W]."""
        distances = [
            np.square(pixels.astype(np.int32) - np.array(colour)).sum(axis=-1)
            for colour in self.colours
        ]
        classes: NDArray[np.int64] = np.stack(distances).argmin(axis=0)
        return classes

    def _file_pixels(self, classes: NDArray[np.integer[Any]]) -> Pixels:
        pixels: Pixels = np.array(self.colours, dtype=np.uint8)[classes]
        return pixels[..., 0] if self.is_gray else pixels


def infer_codec(targets: Iterable[Pixels], *, name: str | None = None) -> Codec:
    """Find out what targets mean from their pixels, or fill in the colours of a named codec.

    Two exact colours over all targets: a mask, whose foreground is the brighter one. Up to 12:
    labels. Else a mask, too, if it looks like one blurred by JPEG or resizing: two colours at least
    64 (of 255) apart, half of all pixels within 2 of one of them, 90 % within 1/8 of the distance.
    Else gray if every pixel is, else rgb.

    Shapes: targets uint8 [H, W] or [H, W, 3].
    Raises: ConfigError if the name is unknown; DataError if the targets do not fit it.
    """
    if name is not None and name not in CODECS:
        raise ConfigError(unknown("codec", name, CODECS))
    if name in ("rgb", "gray"):
        return Codec(name)
    histogram = _histogram(targets)
    if not histogram:
        raise DataError('there is no target to find the codec from. Name it: codec = "rgb".')
    colours = sorted(histogram, key=_brightness)
    if name == "labels":
        return Codec("labels", _as_labels(colours))
    if len(colours) == 2:
        return Codec("mask", tuple(colours))
    if name is None and 2 < len(colours) <= MOST_FOUND_LABELS:
        return Codec("labels", tuple(colours))
    levels = _two_levels(histogram)
    if levels and (name == "mask" or _is_near(histogram, levels)):
        return Codec("mask", levels)
    if name == "mask":
        raise DataError(
            "the targets do not have two levels to tell apart, as a mask needs: "
            f"all lie near {colours[0]}. Give the colours, or choose another codec."
        )
    return Codec("gray" if all(r == g == b for r, g, b in colours) else "rgb")


def _luminance(pixels: Pixels) -> Pixels:
    """Give gray; where the channels are one, exactly that. Shapes: [H, W, 3] -> [H, W]."""
    gray: Pixels = np.rint(pixels @ np.array(LUMINANCE)).astype(np.uint8)
    return gray


def _brightness(colour: Colour) -> tuple[float, Colour]:
    return sum(w * c for w, c in zip(LUMINANCE, colour, strict=True)), colour


def _histogram(targets: Iterable[Pixels]) -> Histogram:
    """Count the exact colours over all targets."""
    counts: Histogram = {}
    for pixels in targets:
        codes = with_channels(pixels).astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        found, count = np.unique(codes, return_counts=True)
        for code, n in zip(found.tolist(), count.tolist(), strict=True):
            colour = (code >> 16, code >> 8 & 255, code & 255)
            counts[colour] = counts.get(colour, 0) + n
    return counts


def _two_levels(histogram: Histogram) -> tuple[Colour, Colour] | None:
    """Give the most frequent colour and the most frequent one far from it, darker first."""
    first = max(histogram, key=histogram.__getitem__)
    far = {c: n for c, n in histogram.items() if _apart(first, c) >= LEVEL_DISTANCE}
    if not far:
        return None
    dark, bright = sorted((first, max(far, key=far.__getitem__)), key=_brightness)
    return dark, bright


def _is_near(histogram: Histogram, levels: tuple[Colour, Colour]) -> bool:
    """Say whether the pixels keep to two levels, as LEVEL_DISTANCE and what follows say."""
    near_limit = NEAR_TOLERANCE * _apart(*levels)
    flat = near = 0
    for colour, count in histogram.items():
        distance = min(_apart(colour, level) for level in levels)
        flat += count * (distance <= FLAT_TOLERANCE)
        near += count * (distance <= near_limit)
    total = sum(histogram.values())
    return flat >= FLAT_SHARE * total and near >= NEAR_SHARE * total


def _apart(one: Colour, other: Colour) -> int:
    """Give the greatest difference in a channel."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _as_labels(colours: list[Colour]) -> tuple[Colour, ...]:
    if not 2 <= len(colours) <= MOST_LABELS:
        raise DataError(
            f"the targets have {len(colours)} colours, and labels take 2 to {MOST_LABELS}. "
            "Save them as PNG (JPEG blurs classes), give the colours, or choose another codec."
        )
    return tuple(colours)


def _colour(value: Any) -> Colour:
    """Read a colour from one number or three, each 0..255."""
    numbers = list(value) if isinstance(value, list | tuple) else [value] * 3
    if len(numbers) != 3 or not all(isinstance(n, int) and 0 <= n <= 255 for n in numbers):
        raise ConfigError(f"a colour is one number or three, each 0 to 255, not {value!r}.")
    return numbers[0], numbers[1], numbers[2]


def _shown(count: int) -> Pixels:
    """Choose colours far apart: the corners of the cube, then always the one farthest from all.

    Shapes: uint8 [K, 3].
    """
    levels = np.array([0, 64, 128, 191, 255])
    lattice = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    chosen = [np.array(corner) for corner in CORNERS[:count]]
    while len(chosen) < count:
        distance = np.square(lattice[:, None] - np.array(chosen)).sum(axis=-1)
        chosen.append(lattice[distance.min(axis=1).argmax()])
    return np.array(chosen, dtype=np.uint8)


def _scores(answer: Floats, size: tuple[int, int], count: int) -> Floats:
    """Give the share of each class in each pixel. Shapes: answer [3, h, w]; result [K, H, W]."""
    values = from_model(answer, answer.shape[1:])
    palette = _shown(count).astype(np.float32) / 127.5 - 1
    distance = np.square(values[None] - palette[:, None, None]).sum(axis=-1)
    scores = np.exp((distance.min(axis=0) - distance) / SCORE_WIDTH)
    return resize(scores / scores.sum(axis=0), size)
