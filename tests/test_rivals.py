"""References: tasks whose answer one formula gives, and the mean answer, which is to be beaten."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fewshot_rt.augment import Augmentation
from fewshot_rt.benchmarks.forest import PixelForest
from fewshot_rt.benchmarks.unet import UNet, train_unet
from fewshot_rt.errors import DataError
from fewshot_rt.images import resize
from fewshot_rt.metrics import iou

NONE, ALL = Augmentation(()), Augmentation(("flips", "turns", "crops"))
SIZE = 16


def pictures(count: int, *, seed: int, size: int = SIZE) -> np.ndarray:
    """Smooth colours. Shapes: uint8 [N, H, W, 3]."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (3 * count, 4, 4)).astype(np.float32)
    planes = np.clip(resize(coarse, (size, size)), 0, 255).reshape(count, 3, size, size)
    return planes.transpose(0, 2, 3, 1).astype(np.uint8)


def textures(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Half of each picture is coarse noise and half is faint noise, of one mean."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 32, 32), bool)
    for mask in masks:
        top, left = rng.integers(0, 16, 2)
        mask[top : top + 16, left : left + 16] = True
    noise = rng.normal(0, np.where(masks, 50, 8)[..., None], (count, 32, 32, 3))
    return np.clip(128 + noise, 0, 255).astype(np.uint8), masks


def to_planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2) / 127.5 - 1


def folded(images: np.ndarray) -> np.ndarray:
    """What no linear change of colours gives: gray is black, black and white are white."""
    return np.abs(images.astype(int) * 2 - 255).astype(np.uint8)


@pytest.mark.parametrize("change", [lambda images: 255 - images, folded], ids=["negative", "fold"])
def test_the_unet_learns_a_change_of_colours(change: Callable[[np.ndarray], np.ndarray]) -> None:
    inputs, test = (np.repeat(pictures(8, seed=k)[..., :1], 3, axis=-1) for k in (0, 1))
    net = train_unet(inputs, change(inputs), steps=60, seed=0, augmentation=NONE)
    targets = to_planes(change(test))
    mean = to_planes(change(inputs)).mean(axis=0)
    error = np.square(net.answer(test) - targets).mean()
    assert error < 0.4 * np.square(mean - targets).mean()


def test_the_unet_begins_with_the_best_linear_change_of_colours() -> None:
    inputs = pictures(4, seed=0)
    given = to_planes(inputs)
    mixing = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 3))
    targets = np.einsum("ij,njhw->nihw", mixing, given) + 0.1
    net = UNet()
    net.begin(torch.from_numpy(given), torch.from_numpy(targets))
    np.testing.assert_allclose(net.answer(inputs), targets, atol=1e-4)
    gray = np.repeat(inputs[..., :1], 3, axis=-1)
    net.begin(torch.from_numpy(to_planes(gray)), torch.from_numpy(-to_planes(gray)))
    np.testing.assert_allclose(net.answer(gray), -to_planes(gray), atol=1e-4)


def test_the_same_seed_gives_the_same_unet_and_leaves_the_dice_alone() -> None:
    inputs = pictures(3, seed=0)
    state = torch.get_rng_state()
    one, two, other = (
        train_unet(inputs, inputs, steps=2, seed=seed, augmentation=ALL).answer(inputs)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(1, 1), (13, 7), (16, 24)])
def test_the_unet_takes_any_size_and_number(shape: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, *shape, 3), dtype=np.uint8)
    net = UNet()
    answers = net.answer(images)
    assert answers.shape == (9, 3, *shape)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers[8:], net.answer(images[8:]), atol=1e-5)


def test_the_forest_tells_textures_apart() -> None:
    pytest.importorskip("sklearn", reason="the forest needs the package 'scikit-learn'")
    inputs, masks = textures(3, seed=0)
    test, expected = textures(2, seed=1)
    forest = PixelForest(pixels=300).fit(inputs, masks)
    answers = forest.predict(test)
    assert answers.shape == (2, 32, 32)
    assert set(np.unique(answers)) == {0, 255}
    for answer, target in zip(answers, expected, strict=True):
        assert iou(answer > 0, target) > 0.6
    again = PixelForest(pixels=300, jobs=2).fit(inputs, masks).predict(test)
    np.testing.assert_array_equal(again, answers)


def test_a_forest_without_pairs_says_so() -> None:
    with pytest.raises(DataError, match="call fit first"):
        PixelForest().predict(pictures(1, seed=0))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.ensemble", None)
    with pytest.raises(DataError, match=r"Install fewshot-rt\[demo\]"):
        PixelForest().fit(*textures(1, seed=0))
