"""Photographs that come with scikit-image, and pairs of crops of them.

Only files inside of the installed package are read. scikit-image and scipy are imported only when
something is drawn. Axes: N pairs, H W pixels.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewshot_rt.codecs import LUMINANCE
from fewshot_rt.images import Pixels, with_channels

from .draws import Draw, Pair, demo_packages, of_pairs, resized, resized_mask

# Different photographs to train and to test on, taken in turn; names of functions of skimage.data.
NAMES = {
    "train": ("astronaut", "coffee", "stereo_motorcycle", "camera"),
    "test": ("cat", "rocket", "brick", "coins"),
}
# Colours are known only to who has seen the like: trained on left halves, tested on right ones.
COLOURED = ("immunohistochemistry", "coffee", "retina", "cat")
PAGES = ("page", "text")
# A crop is this many times as wide as asked for, at most, before it is made smaller.
WIDEST = 2.5
WIDEST_OF_MASKS = 1.5
# Crops with less deviation than this, of 255, show nothing; they are drawn again, not for ever.
LEAST_DEVIATION, MOST_DRAWS = 12, 50
# Gray levels that are surely background and surely coin in the photograph; smaller spots are dirt.
COIN_BACKGROUND, COIN_SURFACE, COIN_LEAST_PIXELS = 30, 150, 200
# Side of the window of the threshold of a page, in pixels: about two lines of text.
PAGE_WINDOW = 25
EDGE_SIGMA, EDGE_GAIN = 1.0, 4.0
NOISE = 0.15  # standard deviation, of the range
HOLE_SIDES, HOLE_LEVEL = (0.2, 0.4), 128  # share of a side


def of_photographs(change: Callable[[Pixels, np.random.Generator], Pair]) -> Draw:
    """Make the draw of crops of photographs, of which a function makes pairs.

    change: takes a crop, uint8 [H, W, 3], and dice; gives input and target.
    """

    def pair(split: str, index: int, size: int, rng: np.random.Generator) -> Pair:
        photograph = read_photograph(NAMES[split][index % len(NAMES[split])])
        window = _window(photograph, size, rng, widest=WIDEST)
        return change(resized(photograph[window], (size, size)), rng)

    return of_pairs(pair)


def of_coins() -> Draw:
    """Make the draw of crops of coins and their masks: train left, test right."""
    return _of_halves([_kept_coins], widest=WIDEST_OF_MASKS, bring=resized_mask)


def of_pages() -> Draw:
    """Make the draw of crops of pages and their ink, white: train left, test right."""
    choices = [partial(page, name) for name in PAGES]
    return _of_halves(choices, widest=WIDEST_OF_MASKS, bring=resized_mask)


def of_colours() -> Draw:
    """Make the draw of gray crops of photographs and their colours: train left, test right."""
    choices = [partial(_grayed, name) for name in COLOURED]
    return _of_halves(choices, widest=WIDEST, bring=resized)


@cache
def read_photograph(name: str) -> Pixels:
    """Read a photograph of `skimage.data` by name; of a stereo pair, the left one.

    Shapes: uint8 [H, W, 3].
    Raises: DataError if scikit-image is not installed.
    """
    with demo_packages():
        from skimage import data
    found = getattr(data, name)()
    pixels: Pixels = found[0] if isinstance(found, tuple) else found
    return with_channels(pixels)


def coins() -> tuple[Pixels, Pixels]:
    """Give the photograph of coins and its mask by a classical segmentation.

    The gradient is flooded from pixels that are surely background and surely coin; then holes are
    filled and specks left out.

    Shapes: both uint8 [H, W]; the mask is 0 and 255.
    Raises: DataError if scikit-image is not installed.
    Source: Beucher & Lantuejoul 1979 (watershed of the gradient).
    """
    with demo_packages():
        from scipy import ndimage
        from skimage import data, filters, segmentation
    photograph: Pixels = data.coins()
    seeds = np.where(photograph > COIN_SURFACE, 2, np.where(photograph < COIN_BACKGROUND, 1, 0))
    flooded = segmentation.watershed(filters.sobel(photograph), seeds) == 2
    regions, _ = ndimage.label(ndimage.binary_fill_holes(flooded))
    is_coin: NDArray[Any] = np.bincount(regions.ravel()) >= COIN_LEAST_PIXELS
    is_coin[0] = False
    return photograph, np.where(is_coin[regions], 255, 0).astype(np.uint8)


@cache
def page(name: str) -> tuple[Pixels, Pixels]:
    """Give a photograph of printed text and its ink, by a threshold that follows the light.

    Shapes: both uint8 [H, W]; ink is 255, paper 0.
    Raises: DataError if scikit-image is not installed.
    Source: Sauvola & Pietikainen 2000.
    """
    with demo_packages():
        from skimage import filters
    photograph = read_photograph(name)[..., 0]
    threshold = filters.threshold_sauvola(photograph, window_size=PAGE_WINDOW)
    return photograph, np.where(photograph < threshold, 255, 0).astype(np.uint8)


def edges(crop: Pixels, _rng: np.random.Generator) -> Pair:
    """Pair a crop with the strength of its edges, bright on black.

    Source: Sobel's gradient of the gray picture, blurred a little.
    """
    with demo_packages():
        from scipy import ndimage
        from skimage import filters
    smooth = ndimage.gaussian_filter(_gray(crop) / 255, EDGE_SIGMA)
    strength = np.clip(EDGE_GAIN * filters.sobel(smooth), 0, 1) * 255
    return crop, with_channels(np.rint(strength).astype(np.uint8))


def denoising(crop: Pixels, rng: np.random.Generator) -> Pair:
    """Pair a crop under Gaussian noise of 0.15 of the range with the clean one."""
    noisy = crop + 255 * NOISE * rng.standard_normal(crop.shape)
    return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8), crop


def inpainting(crop: Pixels, rng: np.random.Generator) -> Pair:
    """Pair a crop that a gray square covers in part with the whole one."""
    side = round(float(rng.uniform(*HOLE_SIDES)) * crop.shape[0])
    top, left = (int(rng.integers(length - side + 1)) for length in crop.shape[:2])
    covered = crop.copy()
    covered[top : top + side, left : left + side] = HOLE_LEVEL
    return covered, crop


_kept_coins = cache(coins)


def _gray(image: Pixels) -> Pixels:
    """Give the luminance. Shapes: [H, W, 3] -> [H, W]."""
    gray: Pixels = np.rint(image @ np.array(LUMINANCE)).astype(np.uint8)
    return gray


def _grayed(name: str) -> Pair:
    photograph = read_photograph(name)
    return _gray(photograph), photograph


def _of_halves(
    choices: Sequence[Callable[[], Pair]],
    *,
    widest: float,
    bring: Callable[[Pixels, tuple[int, int]], Pixels],
) -> Draw:
    """Make the draw of crops of halves of inputs and targets, taken in turn.

    bring: brings a crop of a target to a size.
    """

    def pair(split: str, index: int, size: int, rng: np.random.Generator) -> Pair:
        source, target = map(with_channels, choices[index % len(choices)]())
        middle = source.shape[1] // 2
        half = slice(None, middle) if split == "train" else slice(middle, None)
        source, target = source[:, half], target[:, half]
        window = _window(source, size, rng, widest=widest)
        return resized(source[window], (size, size)), bring(target[window], (size, size))

    return of_pairs(pair)


def _window(
    image: Pixels, size: int, rng: np.random.Generator, *, widest: float
) -> tuple[slice, slice]:
    """Draw a square window in which an image shows something, if it does at all."""
    most = min(*image.shape[:2], round(widest * size))
    gray = _gray(image)
    for _ in range(MOST_DRAWS):
        side = int(rng.integers(min(size, most), most + 1))
        top, left = (int(rng.integers(length - side + 1)) for length in gray.shape)
        window = slice(top, top + side), slice(left, left + side)
        if gray[window].std() >= LEAST_DEVIATION:
            break
    return window
