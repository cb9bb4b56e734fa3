"""What `make gpu` makes of its figures. Reference: figures written by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_gpu_rehearsal import make_stage, verdicts

from fewshot_rt.benchmarks import gpu_answer, gpu_attention, gpu_denoiser
from fewshot_rt.benchmarks.gpu_report import make_answer_table, make_attention_table, newest
from fewshot_rt.benchmarks.gpu_table import show
from fewshot_rt.benchmarks.gpu_units import Outcome
from fewshot_rt.benchmarks.record import Record


@pytest.fixture
def make_outcome() -> Callable[..., Outcome]:
    """A function that wraps figures as if they had been measured."""

    def make(kind: str, variants: dict[str, Any], **settings: Any) -> Outcome:
        record: Record = make_stage().record(
            kind=kind,
            case="owner/base",
            images=4,
            reference="",
            variants=variants,
            settings=settings,
            parity={name: {"rel_l2": 0.0} for name in variants},
        )
        return Outcome(case=record.case, record=record)

    return make


def times(median_ms: float, **others: float) -> dict[str, float]:
    return {"median_ms": median_ms, "p10_ms": median_ms, "p90_ms": median_ms, "count": 5} | others


@pytest.mark.parametrize(
    ("share", "fp8_ms", "ours_ms", "attention", "paper_ms", "expected"),
    [
        (0.65, 10.0, 1.0, "ours", 30000.0, "met"),
        (0.64, 10.1, 1.1, "ours", 29999.0, "not met"),
        # A kernel that is not level leaves the graph alone, which is as good.
        (0.70, 5.0, 1.1, "torch", 60000.0, "met"),
    ],
)
def test_aims_are_judged_by_the_figures(
    share: float,
    fp8_ms: float,
    ours_ms: float,
    attention: str,
    paper_ms: float,
    expected: str,
    make_outcome: Callable[..., Outcome],
) -> None:
    graph = "aoti + CUDA graph"
    speeds = {"tflops": 500.0, "of_bf16_peak": share}
    outcomes = [
        make_outcome(
            gpu_denoiser.KIND,
            {
                "eager": times(20.0, tflops=100.0, of_bf16_peak=0.1),
                graph: times(13.0, **speeds),
                f"{graph} + fp8": times(fp8_ms, tflops=900.0, of_bf16_peak=1.2),
            },
            attention=attention,
            head_width=64,
        ),
        make_outcome(
            gpu_attention.KIND,
            {
                "ours": times(ours_ms, tflops=400.0),
                "cuDNN": times(1.0, tflops=400.0),
            },
            width=64,
        ),
        make_outcome(
            gpu_answer.KIND,
            {
                "9 frames, 1 step, eager": times(100.0),
                "9 frames, 1 step, official": times(1.0),
            },
            part=gpu_answer.OWN,
        ),
        make_outcome(
            gpu_answer.KIND,
            {"from few": {"extrapolated_ms": paper_ms}},
            part=gpu_answer.FEW,
        ),
    ]
    found = verdicts(show(outcomes, is_rehearsal=False))
    assert len(found) == 4
    assert list(found)[-1].startswith("300 x")
    assert set(found.values()) == {expected}
    assert set(verdicts(show(outcomes, is_rehearsal=True)).values()) == {"open"}


def test_documents_show_the_newest_record_of_each_case(
    make_outcome: Callable[..., Outcome],
) -> None:
    def measured(ours_ms: float, **settings: Any) -> Record:
        variants = {"ours": times(ours_ms, tflops=400.0), "cuDNN": times(3.0), "flash": times(4.0)}
        found = make_outcome(gpu_attention.KIND, variants, triton="3", cudnn=9, **settings).record
        assert found is not None
        machine, versions = {**found.machine, "gpu": "a card"}, {"torch": "2"}
        return replace(found, machine=machine, versions=versions, floor={"flops": 1.0})

    old, new = (measured(ms, rehearsal=False) for ms in (1.0, 2.0))
    records = newest([old, new, measured(9.0)], gpu_attention.KIND)
    assert records == [new]
    shown = make_attention_table(records)
    assert "| owner/base | 2 ms | 400 | - | 1.50x | 2.00x | - |" in shown
    assert "medians of 5 timings; a card; torch 2, triton 3, cuDNN 9" in shown
    told = {"from few": {"extrapolated_ms": 1234.0}}
    answer = make_outcome(gpu_answer.KIND, told, part="few", triton="3", cudnn=9).record
    assert answer is not None
    shown = make_answer_table([replace(answer, versions={"torch": "2"})])
    assert "| base | few | from few | 1234 ms |" in shown
