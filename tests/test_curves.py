"""Skills, tables and curves of made-up records; figures by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewshot_rt.benchmarks.curves import (
    draw_curves,
    find_skills,
    latest_comparison,
    make_group_table,
    make_mean_table,
    make_task_table,
)
from fewshot_rt.benchmarks.record import Record

ERRORS = {"copy": 0.5, "mean target": 0.2, "nearest pair": 0.4}


def record(
    case: str, shots: int, seed: int, ours: float, *, steps: int = 10, date: str = "2026-01-01"
) -> Record:
    errors = {"pocket": ours, "u-net": 0.1, **ERRORS}
    return Record(
        kind="learning",
        case=case,
        images=4,
        reference="pocket",
        variants={n: {"iou": 1 - e, "error": e, "seconds": 1.0} for n, e in errors.items()},
        settings={
            "group": "world",
            "moves": case == "edges",
            "metric": "iou",
            "shots": shots,
            "seed": seed,
            "size": 32,
            "steps": steps,
            "test": 4,
            "base": "pocket",
            "revision": "abc",
        },
        date=date,
        commit=None,
        machine={},
        versions={},
    )


RECORDS = [
    record("coins", 3, 0, 0.04),
    record("coins", 3, 1, 0.16),
    record("edges", 3, 0, 0.02),
    record("edges", 3, 1, 0.02),
    record("coins", 10, 0, 0.9),
]


def test_skill_is_against_the_best_baseline_and_bounded() -> None:
    skills = find_skills(RECORDS)
    assert skills["coins", "pocket", 3] == pytest.approx({0: 0.8, 1: 0.2})
    assert skills["coins", "u-net", 3] == pytest.approx({0: 0.5, 1: 0.5})
    assert skills["coins", "mean target", 3] == pytest.approx({0: 0, 1: 0})
    assert skills["coins", "pocket", 10] == {0: -1.0}


def test_a_threshold_is_a_baseline_too() -> None:
    one = record("coins", 3, 0, 0.04)
    with_otsu = replace(one, variants={**one.variants, "otsu": {"iou": 0.9, "error": 0.08}})
    assert find_skills([with_otsu])["coins", "pocket", 3] == pytest.approx({0: 0.5})


def test_the_newest_of_two_records_counts_and_seeds_are_matched() -> None:
    again = record("coins", 3, 0, 0.1, date="2026-02-01")
    together = latest_comparison([*RECORDS, again])
    assert find_skills(together)["coins", "pocket", 3] == pytest.approx({0: 0.5, 1: 0.2})
    only_first = [one for one in RECORDS if (one.case, one.settings["seed"]) != ("coins", 0)]
    # Seed 1 alone is there for both tasks: (.2 + .9) / 2.
    assert "| pocket | 0.55 |" in make_mean_table(
        [r for r in only_first if r.settings["shots"] == 3]
    )


def test_the_mean_is_over_tasks_and_spreads_over_seeds() -> None:
    table = make_mean_table(RECORDS)
    # Seed 0: (.8 + .9) / 2, seed 1: (.2 + .9) / 2.
    assert "| pocket | 0.70 (0.55 to 0.85) | -1.00 |" in table
    assert "Tasks: 2 with 3 pairs, 1 with 10 pairs; 32x32 pixels" in table


def test_groups_of_tasks_have_means_of_their_own() -> None:
    kept = record("flip", 3, 0, 0.2)
    kept = replace(kept, settings={**kept.settings, "group": "kept-out", "metric": "psnr"})
    table = make_group_table([*RECORDS, kept], shots=3)
    assert "| mean skill | all (3) | world (2) | masks (2) | places (1) | kept-out (1) |" in table
    # Seed 0: (.8 + .9 + 0) / 3, (.8 + .9) / 2; flip has no second seed.
    row = "| pocket | 0.57 | 0.70 (0.55 to 0.85) | 0.70 (0.55 to 0.85) | 0.90 | 0.00 |"
    assert row in table
    with pytest.raises(ValueError, match="30 pairs"):
        make_group_table(RECORDS, shots=30)


def test_a_task_table_shows_the_tasks_own_metric() -> None:
    table = make_task_table(RECORDS, shots=3)
    assert "| coins | iou | 0.900 ± 0.060 | 0.900 ± 0.000 |" in table
    with pytest.raises(ValueError, match="30 pairs"):
        make_task_table(RECORDS, shots=30)


def test_only_records_of_one_protocol_stand_together() -> None:
    other = record("coins", 3, 0, 0.3, steps=99, date="2025-01-01")
    latency = Record(case="x", images=1, reference="a", variants={}, settings={})
    assert latest_comparison([other, *RECORDS, latency]) == RECORDS
    assert latest_comparison([latency]) == []


def test_curves_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "tasks.png"
    draw_curves(RECORDS, path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
