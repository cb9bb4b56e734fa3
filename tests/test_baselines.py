"""References: scikit-image for Otsu's threshold, arithmetic by hand for the others."""

from pathlib import Path

import numpy as np
import pytest
from skimage import data
from skimage.filters import threshold_otsu

from fewshot_rt.baselines import make_baselines, otsu_threshold
from fewshot_rt.codecs import Codec
from fewshot_rt.images import write_image
from fewshot_rt.task import Pair

SIZE = (16, 16)
GRAYS = {"one": 40, "two": 110, "three": 200}


def write_pairs(folder: Path, targets: dict[str, np.ndarray]) -> list[Pair]:
    pairs = []
    for name, target in targets.items():
        source, answer = folder / "input" / f"{name}.png", folder / "target" / f"{name}.png"
        write_image(source, np.full((*SIZE, 3), GRAYS[name], np.uint8))
        write_image(answer, target)
        pairs.append(Pair(name, source, answer))
    return pairs


def flat(level: int, shape: tuple[int, ...] = (*SIZE, 3)) -> np.ndarray:
    return np.full(shape, level, np.uint8)


@pytest.mark.parametrize("name", ["coins", "camera", "page", "moon", "text", "brick", "cell"])
def test_otsu_is_that_of_scikit_image(name: str) -> None:
    photograph = getattr(data, name)()
    assert otsu_threshold(photograph) == threshold_otsu(photograph)


@pytest.mark.parametrize("levels", [(0, 255), (3, 4), (10, 10, 10, 200), (0, 1, 254, 255)])
def test_otsu_of_few_levels(levels: tuple[int, ...]) -> None:
    image = np.array([levels], np.uint8)
    assert otsu_threshold(image) == threshold_otsu(image)


def test_pictures_by_hand(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, {"one": flat(0), "two": flat(90), "three": flat(255)})
    baselines = make_baselines(pairs, Codec("rgb"), size=SIZE)
    assert list(baselines) == ["copy", "mean target", "nearest pair"]
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    np.testing.assert_array_equal(baselines["copy"](image), image)
    np.testing.assert_array_equal(baselines["mean target"](image), flat((0 + 90 + 255) // 3))
    for level, answer in ((50, 0), (100, 90), (160, 255), (255, 255)):
        np.testing.assert_array_equal(baselines["nearest pair"](flat(level)), flat(answer))


def test_answers_have_the_size_of_the_image(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, {"one": flat(30), "two": flat(90)})
    for baseline in make_baselines(pairs, Codec("rgb"), size=SIZE).values():
        assert baseline(flat(90, (7, 33, 3))).shape == (7, 33, 3)


def test_masks_by_hand(tmp_path: Path) -> None:
    left, top, low = (np.zeros(SIZE, np.uint8) for _ in range(3))
    left[:, :8], top[:8], low[8:] = 255, 255, 255
    pairs = write_pairs(tmp_path, {"one": left, "two": top, "three": left})
    baselines = make_baselines(pairs, Codec("mask"), size=SIZE)
    np.testing.assert_array_equal(baselines["mean target"](flat(0)), left)
    np.testing.assert_array_equal(baselines["nearest pair"](flat(120)), top)
    bright = np.repeat(np.where(low > 0, 180, 150).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(baselines["otsu"](bright), low)
    np.testing.assert_array_equal(baselines["copy"](bright), flat(255, SIZE))


def test_otsu_on_a_photograph_is_scikit_images_mask(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, {"one": flat(255, SIZE)})
    photograph = data.coins()
    answer = make_baselines(pairs, Codec("mask"), size=SIZE)["otsu"](
        np.repeat(photograph[..., None], 3, axis=-1)
    )
    np.testing.assert_array_equal(answer > 0, photograph > threshold_otsu(photograph))
