"""Variants of a pair: the same flip, turn, crop or change of colours for the input and the target.

Axes: C channels, H W pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, unknown
from .images import Pixels

OF_PLACES = ("flips", "turns", "crops")
OF_COLOURS = ("colours",)
KINDS = (*OF_PLACES, *OF_COLOURS)
LEAST_CROP = 0.6  # of each side
# Targets are inputs in another order if their sorted levels differ by this at most, on average (of
# 255; files written again differ a little), and what is at one place by more than that.
SAME_LEVELS, LEAST_MOVED = 1.5, 10.0


@dataclass(frozen=True)
class Augmentation:
    """Which variants are made.

    flips: both ways; turns: by 90 degrees; crops: 0.6 to 1 a side. They are right for tasks that
    depend on what is seen, not on where: a mask, an edge, a colour.
    colours: channels change places, some are inverted. Right for tasks that move what is seen.
    """

    kinds: tuple[str, ...]

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(unknown("augmentation", kind, (*KINDS, "auto", "none")))

    @classmethod
    def parse(
        cls, text: str, *, codec: str, pairs: Iterable[tuple[Pixels, Pixels]]
    ) -> "Augmentation":
        """Read "auto", "none", or names with commas.

        "auto": colours where every target is its input in another order (a mirrored picture, a
        puzzle); else flips, turns and crops for masks and labels; none for other pictures, whose
        task may be about places or about light from above. pairs: what auto looks at.
        Shapes: pairs uint8 [H, W, 3].
        Raises: ConfigError for an unknown name.
        """
        if text == "none":
            return cls(())
        if text == "auto":
            if are_rearranged(pairs):
                return cls(OF_COLOURS)
            return cls(OF_PLACES if codec in ("mask", "labels") else ())
        return cls(tuple(part.strip() for part in text.split(",")))

    def variants(
        self, pairs: Sequence[tuple[Pixels, Pixels]], *, count: int, seed: int
    ) -> Iterator[tuple[Pixels, Pixels]]:
        """Make `count` variants of every pair (one if there are no kinds), the pairs first.

        Shapes: as `variant`.
        """
        for index in range(count if self.kinds else 1):
            for number, (source, target) in enumerate(pairs):
                yield self.variant(source, target, index=index, seed=seed * 1000 + number)

    def variant(
        self, source: Pixels, target: Pixels, *, index: int, seed: int
    ) -> tuple[Pixels, Pixels]:
        """Make one variant; index 0 is the pair itself.

        Shapes: source, target uint8 [H, W, 3]; result uint8 [H', W', 3] with H' / W' as H / W for
        crops; turns are made only where the image is square.
        """
        if index == 0 or not self.kinds:
            return source, target
        rng = np.random.default_rng((seed, index))
        draws = rng.random(12)
        images = [source, target]
        if "flips" in self.kinds:
            images = [image[:, ::-1] if draws[0] < 0.5 else image for image in images]
            images = [image[::-1] if draws[1] < 0.5 else image for image in images]
        if "turns" in self.kinds and source.shape[0] == source.shape[1]:
            images = [np.rot90(image, int(4 * draws[2])) for image in images]
        if "crops" in self.kinds:
            scale = LEAST_CROP + (1 - LEAST_CROP) * draws[3]
            images = [_crop(image, scale, draws[4], draws[5]) for image in images]
        if "colours" in self.kinds:
            order, is_inverted = draws[6:9].argsort(), draws[9:] < 0.5
            images = [np.where(is_inverted, 255 - image, image)[..., order] for image in images]
        return np.ascontiguousarray(images[0]), np.ascontiguousarray(images[1])


def are_rearranged(pairs: Iterable[tuple[Pixels, Pixels]]) -> bool:
    """Say whether each target has its input's pixels, in other places. Shapes: uint8 [H, W, 3]."""
    moved = []
    for source, target in pairs:
        if source.shape != target.shape:
            return False
        if np.abs(_sorted_levels(source) - _sorted_levels(target)).mean() > SAME_LEVELS:
            return False
        moved.append(np.abs(source.astype(np.int16) - target).mean())
    return bool(moved) and float(np.mean(moved)) >= LEAST_MOVED


def _sorted_levels(image: Pixels) -> NDArray[np.int16]:
    """Sort the levels of all channels, and of their differences. Shapes: [H, W, 3] -> [H W, 6]."""
    channels = image.reshape(-1, 3).astype(np.int16)
    return np.sort(np.concatenate([channels, channels - np.roll(channels, 1, axis=1)], 1), axis=0)


def _crop(image: Pixels, scale: float, down: float, right: float) -> Pixels:
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    top = round(down * (image.shape[0] - height))
    left = round(right * (image.shape[1] - width))
    return image[top : top + height, left : left + width]
