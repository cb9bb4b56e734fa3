"""References: scikit-image for PSNR and SSIM, counts by hand for the others."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fewshot_rt.codecs import CODECS, Codec
from fewshot_rt.errors import ConfigError
from fewshot_rt.metrics import (
    METRICS,
    check_metrics,
    default_metrics,
    dice,
    iou,
    mae,
    mean_iou,
    measure,
    pixel_accuracy,
    psnr,
    sharpness,
    ssim,
)

A = np.array([[True, True, False], [True, False, False]])
B = np.array([[True, False, False], [True, True, False]])
EMPTY = np.zeros((2, 3), bool)


def test_masks_by_hand() -> None:
    assert iou(A, B) == 2 / 4
    assert dice(A, B) == 4 / 6
    assert pixel_accuracy(A, B) == pytest.approx(4 / 6)


def test_empty_masks() -> None:
    assert iou(EMPTY, EMPTY) == dice(EMPTY, EMPTY) == 1
    assert iou(EMPTY, A) == dice(A, EMPTY) == 0


def test_labels_by_hand() -> None:
    answer, target = np.array([[0, 0, 1, 2]]), np.array([[0, 1, 1, 1]])
    # class 0: 1 of 2, class 1: 1 of 3, class 2: 0 of 1; class 3 is nowhere and does not count
    assert mean_iou(answer, target) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert mean_iou(target, target) == 1


def noisy_pair(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    clean = rng.random(shape).astype(np.float32)
    return clean, np.clip(clean + rng.normal(0, 0.1, shape), 0, 1).astype(np.float32)


@pytest.mark.parametrize("shape", [(11, 11), (33, 20), (31, 40, 3)])
def test_psnr_and_ssim_are_those_of_scikit_image(shape: tuple[int, ...]) -> None:
    clean, noisy = noisy_pair(shape)
    expected = peak_signal_noise_ratio(clean, noisy, data_range=1)
    assert psnr(noisy, clean) == pytest.approx(expected, rel=1e-6)
    expected = structural_similarity(
        clean.astype(np.float64),
        noisy.astype(np.float64),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=2 if len(shape) == 3 else None,
    )
    assert ssim(noisy, clean) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (3, 20), (10, 10, 3)])
def test_small_images_have_a_similarity_too(shape: tuple[int, ...]) -> None:
    clean, noisy = noisy_pair(shape)
    assert ssim(clean, clean) == pytest.approx(1)
    assert -1 <= ssim(noisy, clean) < 1


def test_equal_pictures() -> None:
    clean, _ = noisy_pair((12, 12))
    assert psnr(clean, clean) == 100
    assert mae(clean, clean) == 0
    assert mae(np.zeros((2, 2)), np.ones((2, 2))) == 1


@pytest.mark.parametrize("codec", CODECS)
def test_defaults_fit_their_codec(codec: str) -> None:
    names = default_metrics(codec)
    assert check_metrics(names, codec) == names
    assert set(names) == {name for name, metric in METRICS.items() if codec in metric.codecs}


def test_wrong_metrics_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'psnr'"):
        check_metrics(["pnsr"], "rgb")
    with pytest.raises(ConfigError, match=r"'ssim' does not fit codec 'mask'\. Possible: iou"):
        check_metrics(["iou", "ssim"], "mask")


def test_measure_compares_files() -> None:
    answer, target = A.astype(np.uint8) * 255, B.astype(np.uint8) * 255
    result = measure(answer, target, codec=Codec("mask"), names=("iou", "dice"))
    assert result == {"iou": 2 / 4, "dice": 4 / 6}
    with pytest.raises(ValueError, match="differ in size"):
        measure(answer[:1], target, codec=Codec("mask"), names=("iou",))


def test_sharpness_counts_contrast_band_by_band() -> None:
    """A checkerboard of single pixels has the finest octave alone, one of 2 x 2 the next."""
    fine = np.indices((32, 32)).sum(axis=0) % 2 * 1.0
    next_one = np.kron(fine[:16, :16], np.ones((2, 2)))
    assert sharpness(fine, fine) == 1
    assert sharpness(fine / 2, fine) == pytest.approx(0.5)
    assert sharpness(fine, fine / 2) == pytest.approx(0.5)  # false detail counts, too
    assert sharpness(next_one, fine) == 0
    assert sharpness(1 - fine, fine) == 1  # places and signs do not matter
    both = (fine + next_one) / 2
    assert sharpness(next_one / 2, both) == pytest.approx(0.5)
    assert sharpness(np.ones((8, 8)), np.zeros((8, 8))) == 1  # evenness is no blur


def test_sharpness_sees_colours_but_no_noise_of_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    gray = np.repeat(rng.uniform(size=(32, 32, 1)), 3, axis=-1)
    assert sharpness(gray + rng.integers(-1, 2, gray.shape) / 255, gray) > 0.95
    colours = rng.uniform(size=(32, 32, 3))
    drained = np.repeat(colours @ [[0.299], [0.587], [0.114]], 3, axis=-1)
    assert sharpness(drained, colours) < 0.6
