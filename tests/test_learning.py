"""The comparison end to end with a tiny base: every method answers the same pairs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewshot_rt.bases import open_base
from fewshot_rt.bases.pocket import PATCHES, WAVE_WEIGHT
from fewshot_rt.benchmarks.curves import BASELINES
from fewshot_rt.benchmarks.learning import METHODS, Cell, Protocol, _forget, run_cells
from fewshot_rt.benchmarks.tasks import TASKS
from fewshot_rt.errors import ConfigError


@pytest.fixture
def protocol(tiny_base_folder: Path) -> Protocol:
    return Protocol(base=str(tiny_base_folder), size=32, test=2, steps=2, unet_steps=2)


def test_a_cell_measures_all_methods_and_is_not_measured_twice(
    protocol: Protocol, tmp_path: Path
) -> None:
    cell = Cell(TASKS["scene-silhouette"], 2, 0)
    ((_, record),) = run_cells([cell], protocol, methods=list(METHODS), panels=tmp_path)
    assert record is not None
    assert set(record.variants) == {*METHODS, *BASELINES, "otsu"}
    for name, values in record.variants.items():
        assert 0 <= values["iou"] <= 1, name
        assert 0 <= values["error"] <= 1, name
    assert (tmp_path / "scene-silhouette-2.png").is_file()
    # As it comes back from a file of records.
    known = replace(record, **json.loads(json.dumps(record.to_dict())))
    other = replace(cell, seed=1)
    again = list(run_cells([cell, other], protocol, methods=["u-net"], known=[known]))
    assert again[0] == (cell, None)
    assert again[1][1] is not None
    # A record of fewer methods than are asked for does not stand for the cell.
    fewer = replace(known, variants={"u-net": known.variants["u-net"]})
    ((_, measured),) = run_cells([cell], protocol, methods=["u-net", "forest"], known=[fewer])
    assert measured is not None


def test_the_forest_answers_masks_only(protocol: Protocol) -> None:
    cell = Cell(TASKS["scene-drain"], 1, 0)
    ((_, record),) = run_cells([cell], protocol, methods=["u-net", "forest"])
    assert record is not None
    assert "forest" not in record.variants
    # A mask's squared error is the share of wrong pixels; a picture's is its PSNR.
    error, psnr = (record.variants["copy"][name] for name in ("error", "psnr"))
    assert 0 < error < 10 ** (-psnr / 10) * 4


def test_a_mask_errs_by_its_wrong_pixels(protocol: Protocol) -> None:
    cell = Cell(TASKS["coin-masks"], 1, 0)
    ((_, record),) = run_cells([cell], protocol, methods=["forest"])
    assert record is not None
    for values in record.variants.values():
        assert values["error"] == pytest.approx(1 - values["pixel_accuracy"])


def test_forgetting_changes_every_weight_of_the_denoiser_and_nothing_else(
    tiny_base_folder: Path,
) -> None:
    one: Any = open_base(str(tiny_base_folder))
    other: Any = open_base(str(tiny_base_folder))
    _forget(other, 3)
    torch.testing.assert_close(one.autoencoder.state_dict(), other.autoencoder.state_dict())
    pairs = zip(one.denoiser().named_parameters(), other.denoiser().named_parameters(), strict=True)
    matrices = [(a, b) for (_, a), (_, b) in pairs if a.ndim > 1]
    assert not any(torch.equal(a, b) for a, b in matrices)
    denoiser = other.denoiser()
    waves = denoiser.transformer.get_parameter(PATCHES)[:, -denoiser.waves :]
    # As pretraining draws them, within 5 standard deviations of a sample's.
    assert abs(float(waves.std()) / WAVE_WEIGHT - 1) < 5 / (2 * waves.numel()) ** 0.5


@pytest.mark.parametrize(("size", "shots", "hint"), [(36, 1, "multiple"), (32, 31, "1 to 30")])
def test_what_cannot_be_measured_is_refused_first(
    protocol: Protocol, size: int, shots: int, hint: str
) -> None:
    cells = [Cell(TASKS["scene-drain"], 1, 0), Cell(TASKS["coin-masks"], shots, 0)]
    with pytest.raises(ConfigError, match=hint):
        next(run_cells(cells, replace(protocol, size=size), methods=["u-net"]))


def test_unknown_methods_are_refused(protocol: Protocol) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'forest'"):
        list(run_cells([], protocol, methods=["forst"]))
