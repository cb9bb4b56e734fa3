"""Tables of what `make gpu` measured, for documents: the newest record of each case."""

from collections.abc import Sequence

from . import gpu_attention
from .markdown import table
from .record import Record

ATTENTION, ANSWERS = "gpu-attention", "gpu-answer"  # names of the tables
OTHERS = (gpu_attention.CUDNN, "flash", "flex")


def newest(records: Sequence[Record], kind: str) -> list[Record]:
    """Give the newest measured record of each case and part, of one kind."""
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        settings = record.settings
        if record.kind == kind and record.variants and not settings.get("rehearsal"):
            found[record.case, str(settings.get("part", ""))] = record
    return list(found.values())


def make_attention_table(records: Sequence[Record]) -> str:
    """Make a table with a row for each size: our time, and how much longer the others take."""
    rows = []
    for record in sorted(records, key=lambda record: record.floor["flops"]):
        variants = record.variants
        ours = variants[gpu_attention.OURS]
        more = (
            f"{variants[name]['median_ms'] / ours['median_ms']:.2f}x" if name in variants else "-"
            for name in OTHERS
        )
        size = record.case.removeprefix("attention, ")
        rows.append([size, f"{ours['median_ms']:.3g} ms", f"{ours['tflops']:.0f}", *more])
    headings = ["queries x keys", "ours", "TFLOP/s", *OTHERS]
    count = next(iter(records[0].variants.values()))["count"]
    return (
        f"{table(headings, rows)}\n\nbf16, batch 1; medians of {count} timings; {_origin(records)}"
    )


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
    last = records[-1]
    return (
        f"{last.machine['gpu']}; torch {last.versions['torch']}, triton "
        f"{last.settings['triton']}, cuDNN {last.settings['cudnn']}; {last.date[:10]}, commit "
        f"{last.commit or 'unknown'}."
    )
