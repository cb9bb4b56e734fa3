"""`make gpu`, rehearsed on the CPU at tiny sizes, and what it makes of its figures.

References: the networks themselves in fp32; what `costs` counts for all blocks; figures written by
hand.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fewshot_rt.benchmarks import (
    gpu_answer,
    gpu_attention,
    gpu_checks,
    gpu_clock,
    gpu_denoiser,
    gpu_launches,
    gpu_units,
)
from fewshot_rt.benchmarks.gpu import USUAL, main
from fewshot_rt.benchmarks.gpu_bases import (
    MEASURED,
    PAPER_BASE,
    PAPER_SIZE,
    count_pass,
    find_subjects,
    list_shapes,
)
from fewshot_rt.benchmarks.gpu_compiled import (
    COMPILERS,
    Denoising,
    Variant,
    compile_regions,
    open_random,
)
from fewshot_rt.benchmarks.gpu_units import Stage
from fewshot_rt.benchmarks.record import RESULTS, read_records
from fewshot_rt.cards import find_card
from fewshot_rt.costs import Video, measure_pass
from fewshot_rt.export.compiled import quiet
from fewshot_rt.kernels.launches import ARCHITECTURES, launch_for

LTX, WAN = "Lightricks/LTX-Video", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"


def rehearse(folder: Path, *options: str) -> Any:
    """Run the command; give what it printed and its exit status."""
    return CliRunner().invoke(main, ["--rehearse", "--results", str(folder), *options])


def make_stage() -> Stage:
    later = time.monotonic() + 600
    return Stage(device="cpu", is_rehearsal=True, engine="aoti", deadline=later)


def verdicts(printed: str) -> dict[str, str]:
    """Read the table of aims, which is printed last: verdicts by aim."""
    *_, last = printed.strip().split("\n\n")
    rows = [line.strip("| ").split(" | ") for line in last.splitlines()[2:]]
    return {row[0]: row[-1] for row in rows}


@pytest.mark.slow
def test_a_rehearsal_runs_to_its_last_line(tmp_path: Path) -> None:
    result = rehearse(tmp_path)
    assert result.exit_code == 0, result.output
    records = read_records(tmp_path)
    kinds = [record.kind for record in records]
    kind_of = {"checks": 4, "attention": 3, "denoiser": 4, "answer": 4}
    assert {kind: kinds.count(kind) for kind in kinds} == {
        f"gpu-{section}": count for section, count in kind_of.items()
    }
    assert tuple(kind_of) == USUAL
    assert all(record.settings["rehearsal"] for record in records)
    assert not any(record.settings.get("failed") for record in records)
    assert set(verdicts(result.stdout).values()) == {"open"}
    assert "no figure below is a measurement" in result.stdout

    denoiser = [record for record in records if record.kind == gpu_denoiser.KIND]
    assert [record.images for record in denoiser] == list(gpu_denoiser.BATCHES) * 2
    for record in denoiser[2:]:
        assert set(record.variants) == {"eager", "aoti", "inductor + cuDNN"}
    for record in denoiser[:2]:
        ways = set(record.variants)
        assert {"eager", "inductor", "inductor + swap"} <= ways
        assert sum("CUDA graph" in way for way in ways) == 2
        assert sum(way.endswith("+ fp8") for way in ways) == 1
        # fp8 takes the faster attention, which at these sizes is a matter of chance.
        fp8 = {"+ fp8": 4} if record.settings["attention"] == "ours" else {}
        assert record.settings["swapped"] == {"inductor + swap": 4} | fp8
        assert set(record.parity) == ways
    parts = [record.settings["part"] for record in records if record.kind == gpu_answer.KIND]
    assert parts == [gpu_answer.OWN, gpu_answer.FEW, gpu_answer.TINY, gpu_answer.WHOLE]


@pytest.mark.slow
def test_the_other_families_answer_too(tmp_path: Path) -> None:
    result = rehearse(tmp_path, "--only", "answer", "--bases", f"{LTX}, {WAN}")
    assert result.exit_code == 0, result.output
    records = read_records(tmp_path)
    assert {record.case for record in records} == {LTX, WAN}
    # No tiny autoencoder is known for LTX's latents.
    assert [record.case for record in records].count(LTX) == 3
    for record in records:
        told = {way for way, times in record.variants.items() if "extrapolated_ms" in times}
        assert all("from 2 and 3 measured" in way for way in told)
        assert bool(told) == (record.settings["part"] == gpu_answer.FEW)


def test_processes_compile_side_by_side_and_report_to_one(tmp_path: Path) -> None:
    """One of them fails; the others wait for it in vain, and go on."""
    bases = f"{LTX},no/base"
    result = rehearse(tmp_path, "--at-once", "--only", "denoiser", "--bases", bases)
    assert result.exit_code == 1
    records = read_records(tmp_path)
    assert [record.kind for record in records] == [gpu_denoiser.KIND] * 4
    assert "denoiser no base: its process ended with status 1 and no report" in result.stdout
    assert "| LTX-Video | 4 | eager |" in result.stdout


def test_what_fails_does_not_keep_the_rest_from_being_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("17 GiB are asked for,\nby /home/someone/file.py")

    monkeypatch.setattr(gpu_checks, "check_weights", fail)
    monkeypatch.setattr(gpu_attention, "attention", fail)
    result = rehearse(tmp_path, "--only", "checks,attention")
    assert result.exit_code == 1
    records = {record.case: record for record in read_records(tmp_path)}
    (broken,) = (r for r in records.values() if not r.variants)
    reason = "OutOfMemoryError: 17 GiB are asked for, by ..."
    assert broken.settings["failed"] == {"graphs and weights": reason}
    sizes = [record for record in records.values() if record.kind == gpu_attention.KIND]
    assert len(sizes) == 3
    for record in sizes:
        assert record.settings["failed"] == {"ours": reason}
        assert set(record.variants) == {"torch's choice", "cuDNN", "flash", "flex"}
    assert f"graphs and weights: {reason}" in result.stdout


def test_an_attention_that_errs_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = gpu_attention.attention
    monkeypatch.setattr(gpu_attention, "attention", lambda *values: exact(*values) * 1.05)
    result = rehearse(tmp_path, "--only", "attention")
    assert result.exit_code == 1
    for record in read_records(tmp_path):
        assert "ours" not in record.variants
        assert "is allowed" in record.settings["failed"]["ours"]


@pytest.mark.slow
def test_a_swapped_graph_that_is_wrong_is_neither_chosen_nor_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands for a kernel that fails on a GPU at hand."""
    build = Denoising.build

    def build_wrong(self: Denoising, variant: Variant) -> Any:
        runner, sites = build(self, variant)
        if variant.attention == "ours":
            run = runner.run
            monkeypatch.setattr(runner, "run", lambda inputs: [1.1 * run(inputs)[0]])
        return runner, sites

    monkeypatch.setattr(Denoising, "build", build_wrong)
    monkeypatch.setattr(gpu_denoiser, "build_others", lambda *_: None)
    result = rehearse(tmp_path, "--only", "denoiser", "--bases", LTX)
    assert result.exit_code == 1
    for record in read_records(tmp_path)[:2]:
        assert record.settings["attention"] == "torch"
        assert set(record.settings["failed"]) == {"inductor + swap"}
        assert {"inductor + CUDA graph", "inductor + CUDA graph + fp8"} <= set(record.variants)


def test_nothing_is_begun_when_the_minutes_are_over(tmp_path: Path) -> None:
    result = rehearse(tmp_path, "--minutes", "0", "--only", "checks,denoiser")
    assert result.exit_code == 0
    assert not list(tmp_path.iterdir())
    assert result.stdout.count("skipped") == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure here")
def test_without_a_gpu_it_says_how_to_rehearse(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--results", str(tmp_path)])
    assert result.exit_code == 1
    assert "PyTorch sees none here" in result.output
    assert "make gpu REHEARSE=1" in result.output
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_leaves_no_record_among_measurements() -> None:
    before = sorted(RESULTS.iterdir())
    result = rehearse(RESULTS, "--only", "attention")
    assert result.exit_code == 1
    assert "no measurement" in result.output
    assert sorted(RESULTS.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "hint"),
    [(["--only", "atention"], "Did you mean 'attention'"), (["--bases", "Wan"], "unknown base")],
)
def test_what_is_not_known_is_told(options: list[str], hint: str, tmp_path: Path) -> None:
    result = rehearse(tmp_path, *options)
    assert result.exit_code == 1
    assert hint in result.output


def test_a_missing_diffusers_is_one_clear_error_for_each_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu_units, "find_spec", lambda name: None if name == "diffusers" else find_spec(name)
    )
    result = rehearse(tmp_path)
    assert result.exit_code == 1
    assert [record.case for record in read_records(tmp_path)][:2] == [
        "attention",
        "normed attention",
    ]
    for section in USUAL:
        assert f"section '{section}' needs the package 'diffusers'" in result.stdout


@pytest.mark.parametrize("name", MEASURED)
def test_all_blocks_are_counted_by_looking_at_two(name: str) -> None:
    (subject,) = find_subjects([name], is_rehearsal=True)
    video = Video(frames=9, size=subject.size)
    assert count_pass(subject.card, video) == measure_pass(subject.card, video)


def test_sizes_of_attention_are_those_of_the_bases() -> None:
    card = find_card(PAPER_BASE)
    assert card is not None
    (shape,) = list_shapes(card, Video(frames=9, size=PAPER_SIZE))
    # Two merged frames of 30 x 45 patches, and the prompt; see the card for the heads.
    tokens = 2 * 30 * 45 + card.prompt[0]
    assert (shape.heads, shape.width) == (card.transformer["num_attention_heads"], 64)
    assert shape.length == shape.key_length == tokens
    assert shape.flop == 4 * 48 * 64 * tokens**2


def test_the_truth_is_the_denoiser_in_fp32() -> None:
    """Blocks are widened one by one; afterwards the weights are the very same."""
    (subject,) = find_subjects([LTX], is_rehearsal=True)
    stage = make_stage()
    base, wide = (open_random(subject, stage, weights=kind) for kind in ("bf16", "fp32"))
    wide.denoiser().load_state_dict(base.denoiser().state_dict())
    denoising, expected = (Denoising(each, subject, stage, batch=2) for each in (base, wide))
    before = {name: p.data_ptr() for name, p in base.denoiser().named_parameters()}
    inputs = denoising.inputs(slice(1, 2))
    truth = denoising.exact(inputs)
    with torch.no_grad():
        torch.testing.assert_close(truth, expected.eager(inputs)[0], rtol=1e-5, atol=1e-6)
    assert {name: p.data_ptr() for name, p in base.denoiser().named_parameters()} == before
    assert all(p.dtype is torch.bfloat16 for p in base.denoiser().parameters())


@pytest.mark.slow
@pytest.mark.parametrize("engine", COMPILERS)
def test_a_compiled_region_gives_what_the_region_gives(engine: str) -> None:
    class Region(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.nn.functional.linear(tokens, weight).tanh(),)

    given = torch.randn(3, 16), torch.randn(8, 16)
    with quiet():
        regions = {"region": torch.export.export(Region(), given)}
    stage = replace(make_stage(), is_rehearsal=False)
    compiled = compile_regions(regions, Variant(engine=engine), stage)
    (found,) = compiled["region"](*given)
    torch.testing.assert_close(found, Region()(*given)[0])


class FakeGraph:
    """Stands in for `CudaGraph`: runs at once."""

    def __init__(self, run: Callable[..., Any], inputs: Any) -> None:
        self.run, self.inputs = run, inputs

    def __call__(self, inputs: Any) -> Any:
        return self.run(inputs)


def test_on_a_gpu_calls_are_recorded_and_events_give_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Event:
        passed = 0.0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Event.passed

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: "Event") -> float:
            return other.at - self.at

    def work() -> torch.Tensor:
        Event.passed += 2.0
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(gpu_clock, "CudaGraph", FakeGraph)
    five = gpu_clock.repeated(work, 5, device="cuda")
    summary = gpu_clock.time_in_turns({"five": five}, rounds=3, device="cuda")["five"]
    assert (summary.median_ms, summary.p10_ms, summary.count) == pytest.approx((10, 10, 3))


def test_launches_that_are_tried_fit_the_gpu() -> None:
    for name, width in (("sm_90", 64), ("sm_90", 128), ("sm_89", 128)):
        most = ARCHITECTURES[name].shared_bytes
        found = gpu_launches.candidates(width, most)
        assert len(set(found)) == len(found) > 10
        assert all(
            2 * width * (one.query_block + 2 * one.key_block * one.stages) <= most for one in found
        )
        assert {one.query_block // one.warps for one in found} == {16, 32}
    used = launch_for("sm_90", dtype=torch.bfloat16, width=128, precision="ieee")
    assert used in gpu_launches.candidates(128, ARCHITECTURES["sm_90"].shared_bytes)
