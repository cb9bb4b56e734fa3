"""The tasks that `fewshot-rt bench tasks` measures on, each drawn anew from a seed.

Three groups: events of pocket's world on fresh scenes ("world"), changes of kinds that it plays on
photographs, of which pocket saw none ("photographs"), and changes that were kept out of the world,
on scenes and on photographs ("kept-out").

Axes: N pairs, H W pixels.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewshot_rt.errors import DataError
from fewshot_rt.files import write_text
from fewshot_rt.images import Pixels, find_images, read_image, write_image
from fewshot_rt.metrics import default_metrics
from fewshot_rt.pairs import SPLITS

from . import photographs, scenes
from .draws import Draw, Pair, resized, resized_mask

GROUPS = ("world", "photographs", "kept-out")
# Which quarter of the input stands where in the target: top left and right, bottom left and right.
SHUFFLE = (3, 0, 1, 2)


@dataclass(frozen=True)
class TaskCase:
    """One task to measure on.

    group: of GROUPS. codec: "mask", "rgb", "gray" or "labels". metric: the one to judge by.
    about: one line for people. draw: takes (split, count, size, seed) and gives inputs and targets,
        uint8 [N, H, W, 3]; the same arguments, the same pairs; those of a smaller count come first
        in a larger one; train and test share no material.
    colours: of the classes of "labels" in files. most: pairs for training that there are.
    moves: what is seen goes to other places, too far for a network of small convolutions.
    """

    name: str
    group: str
    codec: str
    metric: str
    about: str
    draw: Draw
    colours: tuple[tuple[int, int, int], ...] = ()
    most: int = sys.maxsize
    moves: bool = False


def write_task(
    case: TaskCase, folder: Path, *, train: int, test: int, size: int, seed: int
) -> None:
    """Write pairs of a task as a folder for `Task.load`; images from an earlier call are replaced.

    Raises: DataError if the folder cannot be written to, a package with photographs is not
        installed, or there are not so many pairs.
    """
    for split, count in zip(SPLITS, (train, test), strict=True):
        for side, images in zip(
            ("input", "target"), case.draw(split, count, size, seed), strict=True
        ):
            for earlier in (folder / split / side).glob("*.png"):
                earlier.unlink()
            for number, image in enumerate(images):
                write_image(folder / split / side / f"{number:03d}.png", image)
    write_text(folder / "task.toml", _settings(case))


def nuclei(folder: Path) -> TaskCase:
    """Make the task of a folder of micrographs and masks, with train/ and test/.

    Raises: DataError when drawing if the folder has not so many pairs.
    """

    def draw(split: str, count: int, size: int, seed: int) -> Pair:
        paths = find_images(folder / split / "input")
        if count > len(paths):
            raise DataError(
                f"{folder} has {len(paths)} pairs to {split}, and {count} were asked for. "
                f"Ask for at most {len(paths)}."
            )
        order = np.random.default_rng((seed, SPLITS.index(split))).permutation(len(paths))
        chosen = [paths[i] for i in order[:count]]
        shape = (size, size)
        inputs = [resized(read_image(path), shape) for path in chosen]
        targets = (read_image(folder / split / "target" / path.name) for path in chosen)
        return np.stack(inputs), np.stack([resized_mask(mask, shape) for mask in targets])

    about = "micrographs of nuclei, fluorescent and stained -> their masks"
    most = len(find_images(folder / "train" / "input"))
    return TaskCase("nuclei", "photographs", "mask", "iou", about, draw, most=most)


def mirror(image: Pixels) -> Pixels:
    """Swap left and right. Shapes: [H, W, 3]."""
    return np.ascontiguousarray(image[:, ::-1])


def flip(image: Pixels) -> Pixels:
    """Swap top and bottom. Shapes: [H, W, 3]."""
    return np.ascontiguousarray(image[::-1])


def turn(image: Pixels) -> Pixels:
    """Turn by 90 degrees, against the clock. Shapes: [H, W, 3], H = W."""
    return np.ascontiguousarray(np.rot90(image))


def jigsaw(image: Pixels) -> Pixels:
    """Move the four quarters round, by SHUFFLE. Shapes: [H, W, 3], H and W even.

    Raises: DataError if a side is odd.
    """
    if image.shape[0] % 2 or image.shape[1] % 2:
        raise DataError(f"an image of {image.shape[:2]} has no quarters: ask for an even size.")
    quarters = [part for rows in np.split(image, 2) for part in np.split(rows, 2, axis=1)]
    a, b, c, d = (quarters[number] for number in SHUFFLE)
    return np.concatenate([np.concatenate([a, b], axis=1), np.concatenate([c, d], axis=1)])


def zoom(image: Pixels) -> Pixels:
    """Show the middle at twice the size. Shapes: [H, W, 3]."""
    height, width = image.shape[:2]
    top, left = height // 4, width // 4
    middle = image[top : top + height // 2, left : left + width // 2]
    return resized(middle, (height, width))


def _settings(case: TaskCase) -> str:
    others = (name for name in default_metrics(case.codec) if name != case.metric)
    metrics = ", ".join(f'"{name}"' for name in (case.metric, *others))
    codec = f'"{case.codec}"'
    if case.colours:
        colours = ", ".join(str(list(colour)) for colour in case.colours)
        codec = f'{{ name = "{case.codec}", colours = [{colours}] }}'
    return f'name = "{case.name}"\ncodec = {codec}\nmetrics = [{metrics}]\n'


def _world(event: str, codec: str, about: str) -> TaskCase:
    is_labels = codec == "labels"
    draw = scenes.of_labels() if is_labels else scenes.of_event(event, is_mask=codec == "mask")
    colours = scenes.LABELS if is_labels else ()
    metric = default_metrics(codec)[0]
    moves = event == "mirror"
    return TaskCase(f"scene-{event}", "world", codec, metric, about, draw, colours, moves=moves)


def _photographs(name: str, draw: Draw, about: str, *, codec: str = "rgb") -> TaskCase:
    metric = default_metrics(codec)[0]
    return TaskCase(name, "photographs", codec, metric, about, draw)


def _moving(name: str, group: str, change: Callable[[Pixels], Pixels], about: str) -> TaskCase:
    """Make the task of a change of places, of scenes if it is called so, else of photographs."""
    if name.startswith("scene-"):
        draw = scenes.of_change(change)
    else:
        draw = photographs.of_photographs(lambda crop, _: (crop, change(crop)))
    return TaskCase(name, group, "rgb", "psnr", about, draw, moves=True)


_CASES = (
    _world("silhouette", "mask", "scenes -> where objects are"),
    _world("depth", "gray", "scenes -> how near things are"),
    _world("labels", "labels", "scenes -> a colour for each family of objects"),
    _world("outline", "gray", "scenes -> the outlines of objects"),
    _world("mirror", "rgb", "scenes -> left and right swapped"),
    _world("drain", "rgb", "scenes -> without colour"),
    _moving("scene-flip", "kept-out", flip, "scenes -> top and bottom swapped"),
    _moving("scene-quarter-turn", "kept-out", turn, "scenes -> turned by 90 degrees"),
    _moving("scene-jigsaw", "kept-out", jigsaw, "scenes -> quarters moved round"),
    TaskCase(
        "scene-keypoints",
        "kept-out",
        "mask",
        "iou",
        "scenes -> dots at centres of objects",
        scenes.of_keypoints(),
    ),
    _photographs("coin-masks", photographs.of_coins(), "coins -> their masks", codec="mask"),
    _photographs(
        "page-ink", photographs.of_pages(), "photographed pages -> their ink", codec="mask"
    ),
    _photographs(
        "edges",
        photographs.of_photographs(photographs.edges),
        "photographs -> strength of edges",
        codec="gray",
    ),
    _photographs("colouring", photographs.of_colours(), "gray photographs -> in colour"),
    _photographs(
        "denoising",
        photographs.of_photographs(photographs.denoising),
        "noisy photographs -> clean ones",
    ),
    _photographs(
        "inpainting",
        photographs.of_photographs(photographs.inpainting),
        "photographs under a gray square -> the whole ones",
    ),
    _moving("mirror", "photographs", mirror, "photographs -> left and right swapped"),
    _moving("zoom", "photographs", zoom, "photographs -> their middle at twice the size"),
    _moving("flip", "kept-out", flip, "photographs -> top and bottom swapped"),
    _moving("jigsaw", "kept-out", jigsaw, "photographs -> quarters moved round"),
)
TASKS: dict[str, TaskCase] = {case.name: case for case in _CASES}
