"""Tables of records as Markdown, put between markers of a document.

<!-- bench:NAME -->
the table of the case NAME
<!-- /bench:NAME -->

Of learning, `bench:tasks` is the table of means, `bench:tasks-N` that of all tasks with N pairs,
`bench:tasks-groups-N` that of groups of tasks. Of the ladder of denoising steps, `bench:steps` is
the table of rungs, `bench:steps-arithmetic` that of arithmetic. Of a GPU, `bench:gpu-attention` is
the table of attention's sizes, `bench:gpu-answer` that of answers.
"""

import re
import sys
from functools import partial
from pathlib import Path

from fewshot_rt.errors import DataError
from fewshot_rt.files import write_text

from .curves import KIND, latest_comparison, make_group_table, make_mean_table, make_task_table
from .gpu_report import ANSWERS, ATTENTION, make_answer_table, make_attention_table, newest
from .markdown import table
from .record import RESULTS, Record, read_records
from .rungs import ARITHMETIC
from .rungs import KIND as RUNGS
from .rungs_tables import (
    latest_rungs,
    make_arithmetic_table,
    make_rungs_table,
    newest_arithmetic,
)
from .starts import KIND as STARTS
from .starts import make_start_table

LEARNING = "tasks"
HEADINGS = ("way", "median", "p10", "p90", "images/s", "against {first}", "first call", "parity")


def update_document(path: Path, folder: Path = RESULTS) -> list[str]:
    """Write the latest table of each case that a document marks; give the names of the cases.

    Raises: DataError if a marked case has no record, or an opening marker no closing one.
    """
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"<!-- bench:([\w-]+) -->", text)
    records = read_records(folder)
    # Cells of learning have tables together, and may be called as other records are.
    alone = [record for record in records if record.kind not in (KIND, RUNGS, ARITHMETIC)]
    tables = {record.case: partial(make_table, record) for record in alone}
    together = latest_comparison(records)
    if together:
        tables |= {LEARNING: partial(make_mean_table, together)}
        for shots in {int(record.settings["shots"]) for record in together}:
            tables[f"{LEARNING}-{shots}"] = partial(make_task_table, together, shots=shots)
            tables[f"{LEARNING}-groups-{shots}"] = partial(make_group_table, together, shots=shots)
    rungs, arithmetic = latest_rungs(records), newest_arithmetic(records)
    if rungs:
        tables["steps"] = partial(make_rungs_table, rungs)
    if arithmetic:
        tables[ARITHMETIC] = partial(make_arithmetic_table, arithmetic)
    for name, make in ((ATTENTION, make_attention_table), (ANSWERS, make_answer_table)):
        if found := newest(records, name):
            tables[name] = partial(make, found)
    for name in names:
        if name not in tables:
            raise DataError(f"{path} marks bench:{name}, but {folder} holds no record of it.")
        text = replace_block(text, name, tables[name]())
    write_text(path, text)
    return names


def replace_block(text: str, name: str, content: str) -> str:
    """Put content between the markers of a name.

    Raises: DataError if the markers are not there.
    """
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, opening, rest = text.partition(start)
    _, closing, after = rest.partition(end)
    if not opening or not closing:
        raise DataError(f"the markers {start} and {end} are not both there. Add them.")
    return f"{before}{start}\n{content.strip()}\n{end}{after}"


def make_table(record: Record) -> str:
    """Make the table of one record, with what it was measured on below it."""
    if record.kind == STARTS:
        return make_start_table(record)
    return _qualities(record) if record.kind == "quality" else _latencies(record)


def _qualities(record: Record) -> str:
    """Make a table with a row for each who answered and a column for each metric."""
    names = list(record.variants[record.reference])
    rows = [
        [who, *(_figure(values[name]) if name in values else "" for name in names)]
        for who, values in record.variants.items()
    ]
    settings = ", ".join(f"{key} {value}" for key, value in record.settings.items())
    origin = f"{record.date[:10]}, commit {record.commit or 'unknown'}"
    caption = f"Mean over {record.images} images; {settings}; {origin}."
    return f"{table(['who', *names], rows)}\n\n{caption}"


def _figure(value: float) -> str:
    if value == round(value) and abs(value) >= 10:
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _latencies(record: Record) -> str:
    first = next(iter(record.variants))
    headings = [heading.format(first=first) for heading in HEADINGS]
    rows = [_cells(record, name, first) for name in record.variants]
    return f"{table(headings, rows)}\n\n{_caption(record)}"


def _cells(record: Record, name: str, first: str) -> list[str]:
    times = record.variants[name]
    median = times["median_ms"]
    parity = record.parity.get(name)
    return [
        name,
        *(f"{times[key]:.1f} ms" for key in ("median_ms", "p10_ms", "p90_ms")),
        f"{1000 * record.images / median:.1f}",
        f"{record.variants[first]['median_ms'] / median:.2f}x",
        f"{times['first_ms']:.0f} ms",
        f"{parity['rel_l2']:.0e}" if parity else "reference",
    ]


def _caption(record: Record) -> str:
    machine, floor, versions = record.machine, record.floor, record.versions
    count = int(next(iter(record.variants.values()))["count"])
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    lead = record.settings.get("lead")
    lead = f", each after {lead} that are not timed" if lead else ""
    return (
        f"{record.images} images a call, {count} calls each, in turns{lead}. Floor: "
        f"{floor['floor_ms']:.1f} ms ({floor['flops'] / 1e9:.1f} GFLOP at "
        f"{floor['flops_per_second'] / 1e9:.0f} GFLOP/s measured). {machine['cpu']}, "
        f"{machine['cores']} cores{gpu}; torch {versions['torch']}, onnxruntime "
        f"{versions['onnxruntime']}; {record.date[:10]}, commit {record.commit or 'unknown'}."
    )


if __name__ == "__main__":
    for document in sys.argv[1:]:
        update_document(Path(document))
