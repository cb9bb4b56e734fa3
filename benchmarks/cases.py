"""Folders of pairs to measure on, made from pictures that come with scikit-image.

    python -m fewshot_rt.benchmarks.cases coins FOLDER

Axes: H W pixels.
"""

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from fewshot_rt.errors import DataError, FewshotError
from fewshot_rt.files import write_text
from fewshot_rt.images import write_image

from .photographs import coins

TEST_PAIRS = 20
COINS_SETTINGS = """\
name = "coins"
codec = "mask"
metrics = ["iou", "dice", "pixel_accuracy"]
"""


def write_coins(folder: Path, *, pairs: int = 10, size: int = 128, seed: int = 0) -> None:
    """Write crops of a photograph of coins and their masks, as a task folder.

    Crops for training are drawn from the left half of the photograph, the 20 for testing from the
    right half; those of one half may overlap. The same arguments write the same files, and crops
    from an earlier call are replaced.

    Raises: DataError if a crop does not fit into half of the photograph, the folder cannot be
        written to, or scikit-image is not installed.
    """
    photograph, mask = coins()
    middle = photograph.shape[1] // 2
    if pairs < 1 or not 1 <= size <= min(photograph.shape[0], middle):
        raise DataError(
            f"{pairs} crops of {size} pixels cannot be made: ask for at least 1 pair, and for "
            f"1 to {min(photograph.shape[0], middle)} pixels."
        )
    rng = np.random.default_rng(seed)
    halves = {"train": (slice(None, middle), pairs), "test": (slice(middle, None), TEST_PAIRS)}
    for split, (columns, count) in halves.items():
        for side in ("input", "target"):
            for earlier in (folder / split / side).glob("coins-*.png"):
                earlier.unlink()
        for number in range(count):
            window = _window(rng, photograph[:, columns].shape, size)
            name = f"coins-{number:02d}.png"
            write_image(folder / split / "input" / name, photograph[:, columns][window])
            write_image(folder / split / "target" / name, mask[:, columns][window])
    write_text(folder / "task.toml", COINS_SETTINGS)


def _window(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> tuple[slice, slice]:
    """Draw a square window inside of an image."""
    top, left = (int(rng.integers(0, length - size + 1)) for length in shape)
    return slice(top, top + size), slice(left, left + size)


CASES: dict[str, Callable[..., None]] = {"coins": write_coins}


@click.command()
@click.argument("case", type=click.Choice(sorted(CASES)))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--pairs", default=10, show_default=True, help="Pairs for training.")
@click.option("--size", default=128, show_default=True, help="Side of a crop, in pixels.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draw of crops.")
def main(case: str, folder: Path, pairs: int, size: int, seed: int) -> None:
    """Write the folder of pairs of a CASE."""
    try:
        CASES[case](folder, pairs=pairs, size=size, seed=seed)
    except FewshotError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{folder}: {pairs} pairs for training, {TEST_PAIRS} for testing", err=True)


if __name__ == "__main__":
    main()
