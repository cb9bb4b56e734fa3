"""Large images by windows: exact answers of pointwise tasks, and the blend against a plain sum.

The predictors are closed forms in NumPy: their answer to a window is known at every pixel.
"""

import tracemalloc
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewshot_rt.codecs import Codec
from fewshot_rt.errors import ConfigError
from fewshot_rt.images import read_image, to_model, write_image
from fewshot_rt.predict import answer_images, plan, predict
from fewshot_rt.predictor import Predictor, Recipe
from fewshot_rt.schedule import Schedule
from fewshot_rt.tiles import MOST_OVERLAP, Tiling, answer_bands, answer_tiled, spans

Arrays = Mapping[str, np.ndarray]
Task = Callable[[np.ndarray], np.ndarray]  # windows [B, 3, h, w] in [-1, 1] to their answers


def closed_form(
    task: Task, size: tuple[int, int], *, codec: Codec | None = None, batch: int = 4
) -> Predictor:
    """Roles that answer every window with `task`: the velocity leads there in one step."""

    def denoise(tensors: Arrays) -> dict[str, np.ndarray]:
        time = tensors["time"][:, None, None, None, None]
        clean = np.repeat(tensors["answer"], 2, axis=2)
        return {"prediction": ((tensors["noisy"] - clean) / time).astype(np.float32)}

    return Predictor(
        {
            "encoder": lambda tensors: {"answer": task(tensors["image"])[:, :, None]},
            "denoiser": denoise,
            "decoder": lambda tensors: {"image": tensors["latents"][:, :, -1]},
        },
        prompt={},
        recipe=Recipe(
            task="closed form",
            codec=codec or Codec("rgb"),
            metrics=("mae",),
            size=size,
            latent_shape=(3, 2, *size),
            schedule=Schedule(),
            batch=batch,
        ),
        origin="test",
    )


def ramp(windows: np.ndarray) -> np.ndarray:
    """From -0.5 at a window's left edge to 0.5 at its right one, whatever it shows."""
    return np.broadcast_to(np.linspace(-0.5, 0.5, windows.shape[-1]), windows.shape)


def leaning(windows: np.ndarray) -> np.ndarray:
    """A task that mixes all: the picture, where in the window a pixel is, what else is there."""
    down = np.linspace(-0.2, 0.2, windows.shape[-2])[:, None]
    return 0.5 * windows + 0.5 * ramp(windows) + down - windows.mean(axis=(1, 2, 3), keepdims=True)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)


def whole_answer(predictor: Predictor, canvas: np.ndarray, overlap: float = 0.25) -> np.ndarray:
    """The blend before it is decoded. Shapes: uint8 [H, W, 3] -> [3, H, W]."""
    bands = list(answer_bands(predictor, canvas, tiling=Tiling(overlap=overlap)))
    return np.concatenate(bands, axis=1)


def weighted_mean(task: Task, canvas: np.ndarray, size: tuple[int, int], starts: list) -> tuple:
    """The blend as its definition has it: sums of Hann-weighted answers and of weights."""
    (h, w), (height, width) = size, canvas.shape[:2]
    hann = [0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(n) + 0.5) / n) for n in size]
    image = to_model(canvas, (height, width)).astype(np.float64)
    values, weights = np.zeros((3, height, width)), np.zeros((height, width))
    for y in starts[0]:
        for x in starts[1]:
            where = (..., slice(y, y + h), slice(x, x + w))
            values[where] += np.outer(*hann) * task(image[where][None])[0]
            weights[where] += np.outer(*hann)
    return values / weights


@pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 1 / 3, 0.5, MOST_OVERLAP])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 33])
def test_weights_sum_to_one_and_every_pixel_is_covered(window, overlap):
    for length in [*range(window, 2 * window + 5), 517]:
        cover = spans(length, window, tiling=Tiling(overlap=overlap))
        total = np.zeros(length)
        for span in cover:
            assert (span.weights > 0).all()
            assert span.weights.shape == (window,)
            total[span.start : span.start + window] += span.weights
        np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)
        starts = [span.start for span in cover]
        assert (starts[0], starts[-1]) == (0, length - window)
        assert starts == sorted(set(starts))


@pytest.mark.parametrize("overlap", [0, 0.25, 0.4, MOST_OVERLAP])
def test_windows_overlap_enough_and_are_no_more_than_needed(overlap):
    shared = round(overlap * 20)
    for length in range(20, 200):
        starts = [span.start for span in spans(length, 20, tiling=Tiling(overlap=overlap))]
        steps = [later - earlier for earlier, later in pairwise(starts)]
        assert all(step <= 20 - shared for step in steps)
        assert max(steps, default=0) - min(steps, default=0) <= 1
        # One window fewer cannot reach from end to end.
        assert (len(starts) - 2) * (20 - shared) < max(length - 20, 1)


def test_windows_do_not_stick_out():
    with pytest.raises(ValueError, match="does not fit into 15"):
        spans(15, 16, tiling=Tiling())


@pytest.mark.parametrize("overlap", [-0.1, 0.8, 1, 32, float("nan"), float("inf")])
def test_impossible_overlaps_are_refused(overlap):
    with pytest.raises(ConfigError, match=r"0 to 0\.75"):
        Tiling(overlap=overlap)


@pytest.mark.parametrize("overlap", [0, 0.25, 0.6])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_negative_is_exact_at_every_pixel(batch, overlap):
    """300 x 517 by windows of 32 x 48: the answer has the bytes of the exact one."""
    image = noise(300, 517)
    predictor = closed_form(np.negative, (32, 48), batch=batch)
    blend = whole_answer(predictor, image, overlap)
    np.testing.assert_allclose(blend, -to_model(image, (300, 517)), rtol=0, atol=2e-6)
    (answer,) = answer_images(predictor, [image], tiling=Tiling(overlap=overlap))
    assert np.array_equal(answer, 255 - image)


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (Codec("mask", ((5, 5, 5), (9, 0, 0))), lambda dark: [(5, 5, 5), (9, 0, 0)][dark]),
        (Codec("mask"), lambda dark: 255 * dark),
        (Codec("gray"), lambda dark: 255 * dark),
        (Codec("labels", ((1, 1, 1), (2, 2, 2))), lambda dark: 1 + dark),
    ],
    ids=["colours", "mask", "gray", "labels"],
)
def test_answers_of_every_kind_are_exact(codec, expected):
    """Where the image is dark: every kind of answer, decoded after the blend."""
    gray = np.random.default_rng(0).integers(0, 256, (61, 90)).astype(np.uint8)
    predictor = closed_form(lambda windows: np.where(windows < 0, 1, -1), (16, 24), codec=codec)
    image = np.repeat(gray[..., None], 3, axis=-1)
    answer = answer_tiled(predictor, image, tiling=Tiling())
    assert np.array_equal(answer, np.array([expected(0), expected(1)])[(gray < 128).astype(int)])


def test_masks_are_thresholded_after_the_blend():
    """Two windows that disagree: their outline is where the weighted mean crosses zero."""
    left = np.array([0.9] * 12 + [-0.1] * 4)  # blended with the right one's 0.9, above zero
    predictor = closed_form(
        lambda windows: np.broadcast_to(left, windows.shape), (16, 16), codec=Codec("mask")
    )
    image = noise(16, 28)
    answer = answer_tiled(predictor, image, tiling=Tiling(overlap=0.25))
    hann = np.sin(np.pi * (np.arange(16) + 0.5) / 16) ** 2
    blend = -0.1 * hann[12:] + 0.9 * hann[:4]
    expected = np.array([255] * 12 + list(255 * (blend > 0)) + [255] * 8 + [0] * 4)
    assert np.array_equal(answer, np.broadcast_to(expected, (16, 28)))
    assert 0 < (blend > 0).sum() < 4


def test_blend_is_the_weighted_mean_of_all_windows():
    """Against sums over the whole image in float64, for a task that depends on the window."""
    image = noise(75, 100)
    blend = whole_answer(closed_form(leaning, (16, 24)), image, 0.5)
    # By hand: strides of 8 and 12 at most, spread evenly over 59 and 76 pixels.
    starts = [[i * 59 // 8 for i in range(9)], [i * 76 // 7 for i in range(8)]]
    expected = weighted_mean(leaning, image, (16, 24), starts)
    np.testing.assert_allclose(blend, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_no_seam_shows_where_windows_disagree(overlap):
    """Neighbouring windows of 64 pixels differ by a constant: their blend goes over smoothly.

    The share of a window passes from one to the other over the overlap, at most by 2 / overlap in a
    pixel (the slope of two Hann windows' quotient in the middle). Hard tiles jump at once.
    """
    predictor = closed_form(ramp, (64, 64))
    shared = round(64 * overlap)
    image = noise(64, 64 + 5 * (64 - shared))
    slope = 1 / 63
    difference = (64 - shared) * slope
    soft = np.abs(np.diff(whole_answer(predictor, image, overlap))).max()
    assert soft <= difference * 2 / shared + slope
    hard = np.abs(np.diff(whole_answer(predictor, noise(64, 64 * 5), 0))).max()
    assert hard == pytest.approx(1)
    assert soft < hard / 8


@pytest.mark.parametrize("task", [np.negative, leaning])
def test_image_of_the_windows_size_gets_the_same_bytes(task, tmp_path):
    write_image(tmp_path / "images" / "one.png", noise(32, 48))
    predictor = closed_form(task, (32, 48))
    jobs = [plan(tmp_path / "images", tmp_path / out) for out in ("whole", "tiled")]
    list(predict(predictor, jobs[0]))
    list(predict(predictor, jobs[1], tiling=Tiling()))
    whole, tiled = ((tmp_path / out / "one.png").read_bytes() for out in ("whole", "tiled"))
    assert whole == tiled


@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (40, 5), (15, 16), (7, 100), (100, 3)])
def test_images_smaller_than_a_window_keep_their_scale(shape):
    image = noise(*shape)
    seen: list[np.ndarray] = []

    def watch(windows: np.ndarray) -> np.ndarray:
        seen.extend(windows)
        return -windows

    answer = answer_tiled(closed_form(watch, (16, 16), batch=1), image, tiling=Tiling())
    assert np.array_equal(answer, 255 - image)
    # The middle of the first window is the image itself, pixel by pixel.
    top, left = (max(0, 16 - n) // 2 for n in shape)
    height, width = (min(n, 16) for n in shape)
    middle = seen[0][:, top : top + height, left : left + width]
    np.testing.assert_array_equal(middle, to_model(image, shape)[:, :height, :width])
    # Around it lie its own pixels again, nearest first.
    if 8 <= shape[0] < 16:
        np.testing.assert_array_equal(seen[0][:, top + height], middle[:, -1])


@pytest.mark.parametrize("picture", ["checkerboard", "lines"])
def test_one_pixel_of_detail_survives_with_tiles_alone(picture):
    y, x = np.mgrid[:64, :80]
    is_bright = (y + x) % 2 if picture == "checkerboard" else np.isin((y + 2 * x) % 16, (0,))
    image = np.repeat((255 * is_bright).astype(np.uint8)[..., None], 3, axis=-1)
    predictor = closed_form(np.negative, (16, 16))
    (tiled,) = answer_images(predictor, [image], tiling=Tiling())
    (whole,) = answer_images(predictor, [image])
    assert np.array_equal(tiled, 255 - image)
    assert np.abs(whole.astype(int) - (255 - image)).mean() > 25


def test_windows_fill_the_batches():
    """5 x 5 windows in batches of four are seven calls, not one for each window or row."""
    counts: list[int] = []

    def count(windows: np.ndarray) -> np.ndarray:
        counts.append(len(windows))
        return windows

    answer_tiled(closed_form(count, (16, 16)), noise(64, 64), tiling=Tiling())
    assert counts == [4] * 7


def test_large_micrograph_from_file_to_file_in_little_memory(tmp_path):
    """2048 x 2048, while one float copy of it would not fit."""
    image = np.kron(noise(256, 256), np.ones((8, 8, 1), np.uint8))  # quick to write
    write_image(tmp_path / "images" / "large.png", image)
    jobs = plan(tmp_path / "images", tmp_path / "out")
    predictor = closed_form(np.negative, (128, 128))
    tracemalloc.start()
    try:
        results = list(predict(predictor, jobs, tiling=Tiling()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [result.status for result in results] == ["done"]
    assert np.array_equal(read_image(tmp_path / "out" / "large.png"), 255 - image)
    assert peak < image.size * 4


def test_one_bad_image_does_not_stop_the_others(tmp_path):
    """One that cannot be read, and one whose answer is not finite: named, and the rest is done."""
    source = tmp_path / "images"
    for name in ("a", "c", "e"):
        write_image(source / f"{name}.png", noise(20, 50))
    (source / "b.png").write_bytes(b"no image")
    Image.new("RGB", (70, 20), "white").save(source / "d.png")

    def break_on_white(windows: np.ndarray) -> np.ndarray:
        is_white = (windows == 1).all(axis=(1, 2, 3), keepdims=True)
        return np.where(is_white, np.nan, -windows)

    jobs = plan(source, tmp_path / "out")
    results = list(predict(closed_form(break_on_white, (16, 16)), jobs, tiling=Tiling()))
    failed = {r.job.source.name: r.error for r in results if r.status == "failed"}
    assert set(failed) == {"b.png", "d.png"}
    assert "not finite" in failed["d.png"]
    assert {p.name for p in Path(tmp_path / "out").iterdir()} == {"a.png", "c.png", "e.png"}
