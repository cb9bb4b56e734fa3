"""`make gpu-trt` as far as it goes without TensorRT and a GPU.

References: ONNX Runtime in TensorRT's place; what the bases are known to hold.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny.trt import stand_in

from fewshot_rt.benchmarks import gpu_trt
from fewshot_rt.benchmarks.gpu_bases import PAPER_BASE, Subject
from fewshot_rt.benchmarks.gpu_trt import main, measure, show, units
from fewshot_rt.benchmarks.gpu_trt_ways import (
    ADAPTED,
    CHOSEN,
    EAGER,
    FEW,
    MORE_WAYS,
    OURS,
    RESTORED,
    WAYS,
    Way,
)
from fewshot_rt.benchmarks.gpu_units import Outcome, Stage
from fewshot_rt.benchmarks.record import RESULTS, Record, read_records
from fewshot_rt.cards import BOX, find_card
from fewshot_rt.export.engines import trt
from fewshot_rt.kernels.declaration import HAS_TRITON

FACTS = {"TensorRT": "11.4.0.106", "compute capability": "9.0", "GPU": "H100"}


def make_stage(*, is_rehearsal: bool = False) -> Stage:
    later = time.monotonic() + 600
    device = "cpu" if is_rehearsal else "cuda"
    return Stage(device=device, is_rehearsal=is_rehearsal, engine="trt", deadline=later)


@pytest.mark.slow
def test_a_rehearsal_runs_to_its_last_line(tmp_path: Path) -> None:
    options = ["--rehearse", "--results", str(tmp_path), "--bases", PAPER_BASE]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    (record,) = read_records(tmp_path)
    assert record.settings["rehearsal"]
    (figures,) = record.variants.values()
    # Four blocks of one attention each; ours is compiled for four architectures.
    assert (figures["attentions"], figures["ours"]) == (4, 4)
    assert figures["kernels"] == (4 if HAS_TRITON else 0)
    assert figures["weights"] > 4 * 6
    assert "no figure below is a measurement" in result.stdout
    assert f"| {PAPER_BASE} | {OURS} | declare_s" in result.stdout


def test_the_base_in_the_box_is_built_in_all_ways() -> None:
    names = [BOX, PAPER_BASE]
    ways = [unit.measure.args[1] for unit in units(make_stage(), names)]  # type: ignore[attr-defined]
    assert [set(of) for of in ways] == [{*WAYS, *MORE_WAYS}, set(FEW)]
    assert {way.precision for way in ways[0].values()} == set(trt.precisions)
    rehearsed = [
        unit.measure.args[1]  # type: ignore[attr-defined]
        for unit in units(make_stage(is_rehearsal=True), names)
    ]
    assert [set(of) for of in rehearsed] == [{OURS, *MORE_WAYS}, {OURS}]


@pytest.fixture(scope="module")
def measured(make_tiny_base: Callable[..., Any]) -> Record:
    """What is measured where ONNX Runtime stands in, in fp16 since it has no bf16 here."""
    ways = {
        CHOSEN: Way(precision="fp16"),
        "trt int8": Way(precision="int8"),
        "broken": Way(precision="fp16", attention="no such"),
    }
    card = find_card(BOX)
    assert card is not None
    prompt = tuple(make_tiny_base().embed("mask")["prompt"].shape[1:])
    subject = Subject(card=replace(card, prompt=prompt), size=(32, 32), frames=5)
    with pytest.MonkeyPatch.context() as patch, stand_in(FACTS):
        patch.setattr(gpu_trt, "missing_package", lambda *_, **__: "it is not installed.")
        patch.setattr(Stage, "rounds", 2)
        later = time.monotonic() + 600
        stage = Stage(device="cpu", is_rehearsal=False, engine="trt", deadline=later)
        (record,) = measure(subject, ways, make_tiny_base, stage)
    return record


@pytest.mark.slow
def test_engines_are_compared_timed_and_adapted(measured: Record) -> None:
    assert {EAGER, CHOSEN, ADAPTED} == set(measured.variants)
    assert measured.variants[CHOSEN]["count"] == measured.variants[EAGER]["count"] == 2
    assert {"build_s", "load_s", "median_ms"} <= set(measured.variants[CHOSEN])
    assert {"refit_s", "back_s"} <= set(measured.variants[ADAPTED])
    errors = {name: parity["rel_l2"] for name, parity in measured.parity.items()}
    assert set(errors) == {CHOSEN, ADAPTED, RESTORED}
    # With the adapter out again the weights are the very same.
    assert errors[CHOSEN] == errors[RESTORED] < 2e-3
    assert errors[ADAPTED] < 5e-3
    assert measured.settings["failed"] == {"broken": "KeyError: 'no such'"}
    assert measured.settings["skipped"] == {"trt int8": "it is not installed."}
    assert FACTS.items() <= measured.settings.items()


@pytest.mark.slow
def test_the_table_says_what_was_measured_and_what_was_not(measured: Record) -> None:
    failed = Outcome(case="other", record=None, reason="too late", has_failed=True)
    text = show([Outcome(case=BOX, record=measured), failed], is_rehearsal=False)
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {BOX} | {CHOSEN} |"))
    assert "median_ms" in row
    assert f"{measured.parity[CHOSEN]['rel_l2']:.1e}" in row
    for line in (
        "- other: too late",
        f"- {BOX}, broken: failed: KeyError: 'no such'",
        f"- {BOX}, trt int8: skipped: it is not installed.",
    ):
        assert line in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure here")
def test_without_a_gpu_it_says_how_to_rehearse(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--results", str(tmp_path)])
    assert result.exit_code == 1
    assert "PyTorch sees none here" in result.output
    assert "make gpu-trt REHEARSE=1" in result.output
    assert not list(tmp_path.iterdir())


def test_without_tensorrt_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(trt, "missing", lambda: "the package 'tensorrt' is not installed.")
    result = CliRunner().invoke(main, ["--results", str(tmp_path)])
    assert result.exit_code == 1
    assert "this measures TensorRT: the package 'tensorrt' is not installed." in result.output


def test_a_rehearsal_leaves_no_record_among_measurements() -> None:
    result = CliRunner().invoke(main, ["--rehearse", "--results", str(RESULTS)])
    assert result.exit_code == 1
    assert "no measurement" in result.output


def test_what_is_not_known_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--rehearse", "--bases", "Wan", "--results", str(tmp_path)])
    assert result.exit_code == 1
    assert "unknown base" in result.output
