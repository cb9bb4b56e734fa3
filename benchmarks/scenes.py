"""Pairs of fresh scenes of the world: events that it contains, and changes that it lacks.

torch is imported only when something is drawn. Axes: N pairs, H W pixels.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from fewshot_rt.images import Pixels, to_uint8

from .draws import Draw, Pair, demo_packages, of_pairs, resized_mask

# What a scene must show: the share that its objects cover, and what the task changes (of 255).
LEAST_COVERED, MOST_COVERED = 0.04, 0.6
LEAST_CHANGE = 2.5
# The world's colours of families as files hold them, ordered such that each is near the colour in
# which a codec shows its class (black, white, red, cyan, green, magenta, blue, yellow).
LABELS = (
    (0, 0, 0),
    (255, 153, 26),
    (255, 51, 51),
    (38, 242, 242),
    (51, 255, 51),
    (242, 51, 242),
    (51, 76, 255),
    (255, 242, 38),
)
# Regions below this share of the picture get no dot, and pictures with more dots are passed over.
LEAST_REGION, MOST_DOTS = 0.002, 8
DOT_RADIUS = 1 / 16  # of a side


def of_event(event: str, *, is_mask: bool = False) -> Draw:
    """Make the draw of scenes before and after an event of the world.

    is_mask: the scene afterwards becomes 0 and 255.
    """

    def pair(seed: int, size: int) -> Pair:
        scene, after = _play(event, seed, size)
        return scene, resized_mask(after, (size, size)) if is_mask else after

    return _of_scenes(pair)


def of_change(change: Callable[[Pixels], Pixels]) -> Draw:
    """Make the draw of scenes and what a function of pixels, uint8 [H, W, 3], makes of them."""

    def pair(seed: int, size: int) -> Pair:
        scene, _ = _play("silhouette", seed, size)
        return scene, change(scene)

    return _of_scenes(pair)


def of_labels() -> Draw:
    """Make the draw of scenes and the families of their objects, in exactly the colours LABELS."""

    def pair(seed: int, size: int) -> Pair:
        scene, soft = _play("labels", seed, size)
        share = _play("silhouette", seed, size)[1] / 255
        # Soft outlines fade to black: that is undone before the nearest colour is taken.
        colours = soft / np.maximum(share, 0.5)
        palette = np.array(LABELS)
        distance = np.square(colours[..., None, :] - palette[1:]).sum(axis=-1)
        classes = np.where(share[..., 0] > 0.5, 1 + distance.argmin(axis=-1), 0)
        return scene, palette[classes].astype(np.uint8)

    return _of_scenes(pair)


def of_keypoints() -> Draw:
    """Make the draw of scenes and dots at the centres of their regions of objects."""

    def pair(seed: int, size: int) -> Pair:
        scene, silhouette = _play("silhouette", seed, size)
        return scene, draw_dots(silhouette)

    return _of_scenes(pair)


def draw_dots(silhouette: Pixels) -> Pixels:
    """Draw a white dot at the centre of mass of every connected region of a silhouette.

    Regions of less than 0.2 % of the picture get none; beyond 8 regions the picture stays black.

    Shapes: uint8 [H, W, 3]; levels of the result 0 and 255.
    Raises: DataError if scipy is not installed.
    """
    with demo_packages():
        from scipy import ndimage
    regions, count = ndimage.label(silhouette[..., 0] > 127)
    areas = np.bincount(regions.ravel(), minlength=count + 1)
    kept = [k for k in range(1, count + 1) if areas[k] >= LEAST_REGION * regions.size]
    rows, columns = np.indices(regions.shape)
    dots = np.zeros(regions.shape, bool)
    if len(kept) <= MOST_DOTS:
        for y, x in ndimage.center_of_mass(regions > 0, regions, kept):
            dots |= np.hypot(rows - y, columns - x) <= DOT_RADIUS * regions.shape[1]
    return np.repeat(np.where(dots, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)


def _of_scenes(pair: Callable[[int, int], Pair]) -> Draw:
    """Make the draw of scenes that show something: objects, a change, and a target not all black.

    pair: takes the seed of a scene and a size.
    """

    def one(_split: str, _index: int, size: int, rng: np.random.Generator) -> Pair:
        while True:
            seed = int(rng.integers(1 << 62))
            covered = _play("silhouette", seed, size)[1].mean() / 255
            if not LEAST_COVERED <= covered <= MOST_COVERED:
                continue
            scene, target = pair(seed, size)
            change = np.abs(scene.astype(np.int16) - target).mean()
            if change >= LEAST_CHANGE and target.any():
                return scene, target

    return of_pairs(one)


@lru_cache(maxsize=4)
def _play(event: str, seed: int, size: int) -> Pair:
    """Give the first and the last frame of one clip. Shapes: uint8 [H, W, 3]."""
    import torch

    from fewshot_rt.world import make_clips

    generator = torch.Generator().manual_seed(seed)
    clips = make_clips(
        1, size=size, frames=2, generator=generator, events=(event,), pace="repeat_target"
    )
    frames = to_uint8(clips.video[0].permute(1, 2, 3, 0).numpy())
    return frames[0], frames[1]
