"""Tables of what `make gpu` measured, for documents: the newest record of each case."""

from collections.abc import Sequence

from . import gpu_attention
from .markdown import table
from .record import Record

ATTENTION, ANSWERS = "gpu-attention", "gpu-answer"  # names of the tables
OTHERS = (gpu_attention.DEFAULT, gpu_attention.CUDNN, "flash", "flex")


def newest(records: Sequence[Record], kind: str) -> list[Record]:
    """Give the newest measured record of each case and part, of one kind, on the newest's GPU."""
    measured = [
        record
        for record in sorted(records, key=_date)
        if record.kind == kind and record.variants and not record.settings.get("rehearsal")
    ]
    return list(
        {
            (record.case, str(record.settings.get("part", ""))): record
            for record in measured
            if record.machine.get("gpu") == measured[-1].machine.get("gpu")
        }.values()
    )


def make_attention_table(records: Sequence[Record]) -> str:
    """Make a table with a row for each size: our time, and how much longer the others take."""
    rows = []
    for record in sorted(records, key=lambda record: record.floor["flops"]):
        variants = record.variants
        ours = variants.get(gpu_attention.OURS)
        more = (
            f"{variants[name]['median_ms'] / ours['median_ms']:.2f}x"
            if ours and name in variants
            else "-"
            for name in OTHERS
        )
        size = record.case.removeprefix("attention, ")
        own = (f"{ours['median_ms']:.3g} ms", f"{ours['tflops']:.0f}") if ours else ("failed", "-")
        rows.append([size, *own, *more])
    headings = ["queries x keys", "ours", "TFLOP/s", *OTHERS]
    count = next(iter(records[0].variants.values()))["count"]
    caption = f"bf16, batch 1; medians of {count} timings; {_origin(records)}"
    return f"{table(headings, rows)}\n\n{caption}"


def make_answer_table(records: Sequence[Record]) -> str:
    """Make a table with a row for each way to answer one picture, from file to file."""
    rows = []
    for record in records:
        for name, times in record.variants.items():
            base, part = record.case.rpartition("/")[2], record.settings["part"]
            shown = times.get("median_ms", times.get("extrapolated_ms", 0.0))
            rows.append([base, part, name, f"{shown:.0f} ms"])
    return f"{table(['base', 'part', 'way', 'median'], rows)}\n\n{_origin(records)}"


def _origin(records: Sequence[Record]) -> str:
    """Say what was measured, on what, when."""
    last = max(records, key=_date)
    return (
        f"{last.machine['gpu']}; torch {last.versions['torch']}, triton "
        f"{last.settings['triton']}, cuDNN {last.settings['cudnn']}; {last.date[:10]}, commit "
        f"{last.commit or 'unknown'}."
    )


def _date(record: Record) -> str:
    return record.date
