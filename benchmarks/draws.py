"""How pairs of a task are drawn: every pair has dice of its own.

A larger count therefore begins with the pairs of a smaller one. Axes: N pairs, H W pixels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from fewshot_rt.errors import ConfigError, DataError, unknown
from fewshot_rt.images import Pixels, to_model, to_uint8
from fewshot_rt.pairs import SPLITS

# Input and target: [H, W, 3] of one pair, [N, H, W, 3] of a draw.
Pair = tuple[Pixels, Pixels]
# Takes split, the number of the pair in it, size and dice.
DrawOne = Callable[[str, int, int, np.random.Generator], Pair]
# Takes split, count, size and seed.
Draw = Callable[[str, int, int, int], Pair]


def of_pairs(pair: DrawOne) -> Draw:
    """Make the draw of many pairs from that of one.

    Raises, when drawing: ConfigError if the split is neither "train" nor "test"; DataError if the
        count is below 1.
    """

    def draw(split: str, count: int, size: int, seed: int) -> Pair:
        if split not in SPLITS:
            raise ConfigError(unknown("split", split, SPLITS))
        if count < 1:
            raise DataError(f"{count} pairs cannot be drawn: ask for at least 1.")
        key = (seed, SPLITS.index(split))
        pairs = [pair(split, i, size, np.random.default_rng((*key, i))) for i in range(count)]
        sources, targets = zip(*pairs, strict=True)
        return np.stack(sources), np.stack(targets)

    return draw


def resized(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Bring a picture to a size, antialiased. Shapes: [H, W, 3]; size (h, w); result [h, w, 3]."""
    return np.ascontiguousarray(to_uint8(to_model(image, size)).transpose(1, 2, 0))


def resized_mask(mask: Pixels, size: tuple[int, int]) -> Pixels:
    """Bring a mask to a size, again of 0 and 255. Shapes: as `resized`."""
    return np.where(resized(mask, size) > 127, 255, 0).astype(np.uint8)


@contextmanager
def demo_packages() -> Iterator[None]:
    """Say how to get the packages that a block imports.

    Raises: DataError if one is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise DataError(
            f"the package {error.name!r} is not installed. Install fewshot-rt[demo], "
            "which has the photographs."
        ) from error
