"""References: the weights of each kind written out, and a mosaic counted cell by cell."""

from typing import Any

import numpy as np
import pytest
import torch

from fewshot_rt.errors import ConfigError
from fewshot_rt.transition import KINDS, Transition

WEIGHTS = {
    ("linear", 5): (0, 1 / 4, 1 / 2, 3 / 4, 1),
    ("linear", 9): (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1),
    ("quadratic", 5): (0, 1 / 16, 1 / 4, 9 / 16, 1),
    ("quadratic", 9): (0, 1 / 64, 1 / 16, 9 / 64, 1 / 4, 25 / 64, 9 / 16, 49 / 64, 1),
    ("square_root", 5): (0, 1 / 2, 0.5**0.5, 0.75**0.5, 1),
    ("square_root", 9): (0, *((f / 8) ** 0.5 for f in range(1, 8)), 1),
    ("discrete", 5): (0, 0, 1, 1, 1),
    ("discrete", 9): (0, 0, 0, 0, 1, 1, 1, 1, 1),
    ("discrete", 4): (0, 0, 1, 1),
    ("discrete", 2): (0, 1),
    ("repeat_target", 5): (0, 1, 1, 1, 1),
    ("repeat_target", 9): (0, 1, 1, 1, 1, 1, 1, 1, 1),
    ("tiles", 5): (0, 1 / 4, 1 / 2, 3 / 4, 1),
    ("tiles", 9): (0, 2 / 16, 4 / 16, 6 / 16, 8 / 16, 10 / 16, 12 / 16, 14 / 16, 1),
}
BLENDS = [key for key in WEIGHTS if key[0] != "tiles"]


def pair(height: int = 7, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, height, width)).astype(np.float32)
    return images[0], images[1]


def by_hand(x: np.ndarray, y: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    video = np.empty((*x.shape[:-2], len(weights), *x.shape[-2:]), x.dtype)
    for frame, weight in enumerate(weights):
        video[..., frame, :, :] = (1 - weight) * x + weight * y
    return video


@pytest.mark.parametrize(("kind", "frames"), WEIGHTS)
def test_weights(kind: str, frames: int) -> None:
    found = Transition(kind=kind, frames=frames).weights()
    assert found == pytest.approx(WEIGHTS[kind, frames], abs=1e-12)


@pytest.mark.parametrize(("kind", "frames"), BLENDS)
def test_videos_are_the_weighted_sums(kind: str, frames: int) -> None:
    x, y = pair()
    video = Transition(kind=kind, frames=frames).video(x, y)
    np.testing.assert_allclose(video, by_hand(x, y, WEIGHTS[kind, frames]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [2, 5, 9])
@pytest.mark.parametrize("size", [(7, 5), (1, 1), (16, 20)])
def test_numpy_and_torch_play_from_the_input_to_the_target(
    kind: str, frames: int, size: tuple[int, int]
) -> None:
    transition = Transition(kind=kind, frames=frames, seed=3)
    x, y = pair(*size)
    video = transition.video(x, y)
    assert video.dtype == np.float32
    assert video.shape == (3, frames, *size)
    np.testing.assert_array_equal(video[:, 0], x)
    np.testing.assert_array_equal(transition.answer(video), y)
    tensors = transition.video(torch.from_numpy(x), torch.from_numpy(y))
    assert tensors.dtype == torch.float32
    np.testing.assert_array_equal(tensors, video)
    np.testing.assert_array_equal(transition.answer(tensors), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_pairs_one_by_one(kind: str) -> None:
    transition = Transition(kind=kind, frames=5)
    x, y = (np.stack([image, -image]) for image in pair())
    each = [transition.video(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_array_equal(transition.video(x, y), np.stack(each))


def swapped_cells(video: np.ndarray) -> np.ndarray:
    """Say which cells of the 4x4 grid show the target, when the input is 0 and the target 1."""
    frames, height, width = video.shape[1:]
    cells = video[0].reshape(frames, 4, height // 4, 4, width // 4).transpose(0, 1, 3, 2, 4)
    cells = cells.reshape(frames, 16, -1)
    assert (cells == cells[..., :1]).all(), "a cell shows a part of each image"
    swapped: np.ndarray = cells[..., 0].astype(bool)
    return swapped


@pytest.mark.parametrize(("frames", "counts"), [(5, [0, 4, 8, 12, 16]), (9, [*range(0, 17, 2)])])
def test_tiles_swap_cell_by_cell(frames: int, counts: list[int]) -> None:
    x, y = np.zeros((3, 8, 12), np.float32), np.ones((3, 8, 12), np.float32)
    shown = swapped_cells(Transition(kind="tiles", frames=frames, seed=1).video(x, y))
    assert shown.sum(axis=1).tolist() == counts
    # What is swapped stays swapped.
    assert (shown[1:] >= shown[:-1]).all()
    again = swapped_cells(Transition(kind="tiles", frames=frames, seed=1).video(x, y))
    other = swapped_cells(Transition(kind="tiles", frames=frames, seed=2).video(x, y))
    assert (shown == again).all()
    assert (shown != other).any()


@pytest.mark.parametrize("kind", ["linear", "tiles"])
def test_the_gradient_is_the_share_of_the_target(kind: str) -> None:
    x, y = (torch.from_numpy(image) for image in pair(8, 8))
    y.requires_grad_()
    Transition(kind=kind, frames=5).video(x, y)[:, 1].sum().backward()
    assert y.grad is not None
    assert float(y.grad.mean()) == pytest.approx(1 / 4)


def test_unequal_images_are_refused() -> None:
    x, _ = pair()
    with pytest.raises(ValueError, match=r"\(3, 7, 5\) and target \(3, 7, 4\) differ in shape"):
        Transition().video(x, x[..., 1:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "quadratc"}, "unknown transition 'quadratc'. Did you mean 'quadratic'"),
        ({"frames": 1}, "at least 2 frames, not 1"),
    ],
)
def test_wrong_transitions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Transition(**values)
