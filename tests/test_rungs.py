"""The ladder measured end to end on a tiny base, and its tables and picture counted by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewshot_rt.benchmarks.learning import Cell, Protocol
from fewshot_rt.benchmarks.record import Record, append_record
from fewshot_rt.benchmarks.report import update_document
from fewshot_rt.benchmarks.rungs import KIND, measure_arithmetic, run_rungs
from fewshot_rt.benchmarks.rungs_tables import (
    draw_rungs,
    group_of,
    latest_rungs,
    make_arithmetic_table,
    make_rungs_table,
)
from fewshot_rt.benchmarks.tasks import TASKS
from fewshot_rt.distill_config import DistillConfig
from fewshot_rt.images import read_image

RUNGS = [
    *("paper, 50", "paper, 16", "paper, 8", "paper, 4", "paper, 2", "paper, 1"),
    *("paper, dpm, 16", "paper, dpm, 8", "paper, dpm, 4"),
    *("distilled, 4", "distilled, 1", "grid, 4", "onestep, 1"),
]


def record(case: str, seed: int, errors: dict[str, float], **settings: Any) -> Record:
    given: dict[str, Any] = {"shots": 10, "seed": seed, "moves": False, "codec": "gray"}
    given |= {"size": 64, "test": 2, "steps": 250, "base": "pocket", "revision": "r"}
    given |= {"pass_gflop": 0.5} | settings
    variants = {
        name: {"error": error, "steps": int(name.rpartition(" ")[2]), "image_ms": 2.0 * seed + 2}
        for name, error in errors.items()
    }
    variants["copy"] = {"error": 1.0}
    return Record(
        kind=KIND, case=case, images=2, reference="paper, 50", variants=variants, settings=given
    )


def test_a_cell_measures_all_rungs_and_is_not_measured_twice(
    tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fewshot_rt.benchmarks.rungs as module

    monkeypatch.setattr(module, "PAPER_STEPS", (3, 1))
    monkeypatch.setattr(module, "REFERENCE", "paper, 3")
    monkeypatch.setattr(module, "SOLVED_STEPS", (2,))
    monkeypatch.setattr(
        module,
        "DistillConfig",
        lambda **given: DistillConfig(teacher_steps=5, draws=1, updates=1, **given),
    )
    protocol = Protocol(base=str(tiny_base_folder), size=32, test=2, steps=2)
    cell = Cell(TASKS["edges"], 2, 0)
    ((_, found),) = run_rungs([cell], protocol)
    assert found is not None
    rungs = ["paper, 3", "paper, 1", "paper, dpm, 2", *RUNGS[-4:]]
    assert list(found.variants)[: len(rungs)] == rungs
    for name in rungs:
        assert 0 <= found.variants[name]["error"] <= 1, name
        assert 0 <= found.variants[name]["sharpness"] <= 1, name
        assert found.variants[name]["image_ms"] > 0, name
    known = replace(found, **json.loads(json.dumps(found.to_dict())))
    assert list(run_rungs([cell], protocol, known=[known])) == [(cell, None)]


def test_tables_give_skills_by_groups_and_seeds(tmp_path: Path) -> None:
    errors = {"paper, 50": 0.5, "onestep, 1": 0.25}
    records = [
        record("edges", 0, errors),
        record("edges", 1, errors | {"onestep, 1": 0.33}),
        record("mirror", 0, errors, moves=True, codec="rgb"),
        record("mirror", 1, errors, moves=True, codec="rgb"),
    ]
    assert [group_of(r) for r in records[1:3]] == ["perception", "places"]
    lines = make_rungs_table(latest_rungs(records)).splitlines()
    assert lines[0].split(" | ")[1:4] == ["all (2)", "perception (1)", "places (1)"]
    # Skills .75 and .67 by seed for edges, .75 for mirror; 3 ms at the median, half a GFLOP a step.
    assert lines[3] == (
        "| onestep, 1 | 0.73 (0.71 to 0.75) | 0.71 (0.67 to 0.75) | 0.75 |  | 3.0 | 333.3 | 0.50 | "
        "1.0x |"
    )
    assert lines[2].split(" | ")[1] == "0.50"
    assert lines[2].split(" | ")[7] == "25.00"


def test_the_arithmetic_is_that_of_the_literature(tmp_path: Path) -> None:
    """Of CogVideoX1.5 at 480x720: 140 TFLOP at 49 frames and 16 at 5, so 860 times less."""
    found = measure_arithmetic()
    cog = {name: v["zai-org/CogVideoX1.5-5B-I2V"] for name, v in found.variants.items()}
    assert cog["the paper's"] == pytest.approx(100 * 140.4, rel=1e-3)
    assert cog["the paper's"] / cog["1 step, 5 frames"] == pytest.approx(862, abs=2)
    dropped = 2 * (5 * 140.4 + 45 * 32.3)
    assert cog["frames dropped after 5 steps"] == pytest.approx(dropped, rel=2e-3)
    table = make_arithmetic_table(found)
    assert "| the paper's | 49 | 50 | 2 |" in table
    assert "14 PFLOP" in table
    append_record(found, tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:steps-arithmetic -->\n<!-- /bench:steps-arithmetic -->\n")
    assert update_document(page, tmp_path) == ["steps-arithmetic"]
    assert "862x" in page.read_text()


def test_the_picture_has_a_panel_for_each_group(tmp_path: Path) -> None:
    errors = {name: 0.5 - 0.01 * number for number, name in enumerate(RUNGS)}
    records = [record("edges", seed, errors) for seed in (0, 1)]
    draw_rungs(records, tmp_path / "one.png")
    records += [record("mirror", 0, errors, moves=True, codec="rgb")]
    draw_rungs(records, tmp_path / "two.png")
    narrow, wide = (read_image(tmp_path / name).shape for name in ("one.png", "two.png"))
    assert wide[1] > narrow[1]


@pytest.mark.slow
def test_the_command_line_climbs_down(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fewshot_rt.benchmarks.rungs as module

    monkeypatch.setattr(
        module,
        "DistillConfig",
        lambda **given: DistillConfig(teacher_steps=5, draws=1, updates=1, **given),
    )
    words = ("--tasks", "edges", "--seeds", "0", "--shots", 2, "--base", "base", "--size", 32)
    words = (*words, "--steps", 2, "--test", 2, "--results", tmp_path / "results", "--json")
    status, out, err = run("bench", "steps", *words)
    assert status == 0, err
    found = json.loads(out)
    assert found["cells"] == 1
    assert [f"| {name} |" in found["tables"]["rungs"] for name in RUNGS] == [True] * len(RUNGS)
    assert (tmp_path / "results" / "steps.png").is_file()
    status, out, _ = run("bench", "steps", *words)
    assert (status, json.loads(out)["cells"]) == (0, 1)
