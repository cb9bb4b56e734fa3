"""References: the photograph itself, in which every crop must be found in its own half."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import ndimage
from skimage import data

from fewshot_rt.benchmarks import cases
from fewshot_rt.errors import DataError
from fewshot_rt.images import find_images, read_image
from fewshot_rt.task import Task, lint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coins")
    cases.write_coins(folder)
    return folder


def columns_of(crop: np.ndarray, photograph: np.ndarray) -> list[int]:
    """Find the left edges at which a crop stands in the photograph exactly."""
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (1, crop.shape[1]))[:, :, 0]
    starts = np.argwhere((windows == crop[0]).all(axis=-1))
    height, width = crop.shape
    return [int(x) for y, x in starts if (photograph[y : y + height, x : x + width] == crop).all()]


def test_crops_of_the_two_splits_share_no_pixel(folder: Path) -> None:
    photograph = data.coins()
    middle = photograph.shape[1] // 2
    for split, count in (("train", 10), ("test", 20)):
        paths = find_images(folder / split / "input")
        assert len(paths) == count
        for path in paths:
            (left,) = columns_of(read_image(path)[..., 0], photograph)
            assert left >= middle if split == "test" else left + 128 <= middle


def test_the_folder_is_a_sound_mask_task(folder: Path) -> None:
    assert lint(folder) == []
    task = Task.load(folder)
    assert task.name == "coins"
    assert task.codec.name == "mask"
    assert task.metrics[0] == "iou"


def test_the_mask_has_the_24_coins_of_the_photograph() -> None:
    photograph, mask = cases.coins()
    regions, count = ndimage.label(mask)
    assert count == 24
    sizes = np.bincount(regions.ravel())[1:]
    assert sizes.min() > 1000  # pixels; a whole coin and no speck
    assert photograph[mask > 0].mean() > photograph[mask == 0].mean() + 50


def test_the_same_seed_writes_the_same_files_and_a_new_call_replaces(
    folder: Path, tmp_path: Path
) -> None:
    cases.write_coins(tmp_path, pairs=12, seed=1)
    first = {p.relative_to(tmp_path): p.read_bytes() for p in find_images(tmp_path)}
    cases.write_coins(tmp_path)
    again = {p.relative_to(tmp_path): p.read_bytes() for p in find_images(tmp_path)}
    expected = {p.relative_to(folder): p.read_bytes() for p in find_images(folder)}
    assert again == expected
    assert first != again


def test_the_command_line(tmp_path: Path) -> None:
    arguments = ["coins", str(tmp_path / "new"), "--pairs", "2", "--size", "32"]
    result = CliRunner().invoke(cases.main, arguments)
    assert result.exit_code == 0, result.output
    assert len(find_images(tmp_path / "new" / "train")) == 4
    result = CliRunner().invoke(cases.main, ["coins", str(tmp_path / "big"), "--size", "200"])
    assert result.exit_code == 1
    assert "1 to 192 pixels" in result.output


def test_without_scikit_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(DataError, match=r"Install fewshot-rt\[demo\]"):
        cases.write_coins(tmp_path)
