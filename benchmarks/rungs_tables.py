"""Records of the ladder together: a table of rungs, the arithmetic of each, and a picture.

Skill is that of `curves`: 1 - error / error of the best baseline.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .curves import BASELINES, find_skills, latest_comparison
from .markdown import table
from .plots import Layout, draw_panels
from .record import Record
from .rungs import ARITHMETIC, ARITHMETIC_BASES, KIND, REFERENCE

GROUPS = ("all", "perception", "pictures", "places")
UNITS = ((1e3, "PFLOP"), (1.0, "TFLOP"), (1e-3, "GFLOP"))  # in TFLOP
SERIES = ("paper", "paper, dpm", "distilled", "grid", "onestep")


def latest_rungs(records: Sequence[Record]) -> list[Record]:
    """Take the records of the ladder that belong together with the newest, of as many pairs."""
    together = latest_comparison(records, kind=KIND)
    shots = {record.date: record.settings["shots"] for record in together}
    return [r for r in together if r.settings["shots"] == shots[max(shots)]]


def group_of(record: Record) -> str:
    """Say what kind of task it is: places move, perception answers no picture in colour."""
    if record.settings["moves"]:
        return "places"
    return "pictures" if record.settings["codec"] == "rgb" else "perception"


def make_rungs_table(records: Sequence[Record]) -> str:
    """Make a Markdown table: a row for each rung, mean skill by groups of tasks, time, arithmetic.

    Where there are several seeds, the least and the greatest mean over tasks stand beside.
    """
    rungs = [name for name in records[0].variants if name not in BASELINES]
    grouped = _grouped(records)
    long_ms = _median(records, REFERENCE, "image_ms")
    rows = []
    for rung in rungs:
        steps = int(records[0].variants[rung]["steps"])
        ms = _median(records, rung, "image_ms")
        gflop = steps * records[0].settings["pass_gflop"]
        sharp = [r.variants[rung]["sharpness"] for r in records if "sharpness" in r.variants[rung]]
        rows.append(
            [
                rung,
                *(_skill(found, rung) for found in grouped.values()),
                f"{np.mean(sharp):.2f}" if sharp else "",
                f"{ms:.1f}",
                f"{1000 / ms:.1f}",
                f"{gflop:.2f}" if gflop else "",
                f"{long_ms / ms:.1f}x",
            ]
        )
    counts = (f"{name} ({_count(found)})" for name, found in grouped.items())
    headings = [
        "rung, steps", *counts, "sharpness", "ms", "images/s", "GFLOP", f"against {REFERENCE}",
    ]  # fmt: skip
    return f"{table(headings, rows)}\n\n{_caption(records)}"


def make_arithmetic_table(record: Record) -> str:
    """Make a Markdown table of the denoiser's arithmetic, and how much less than the paper's."""
    first = record.variants[record.reference]
    rows = []
    for name, values in record.variants.items():
        cells = [name, *(f"{values[key]:.0f}" for key in ("frames", "steps", "passes"))]
        for base, _ in ARITHMETIC_BASES:
            cells += [_tera(values[base]), f"{first[base] / values[base]:.0f}x"]
        rows.append(cells)
    headings = ["setting", "frames", "steps", "passes a step"]
    for base, (height, width) in ARITHMETIC_BASES:
        headings += [f"{base.rpartition('/')[2]}, {width}x{height}", "less"]
    commit = record.commit or "unknown"
    caption = f"The denoiser alone, one image; computed, not measured; commit {commit}."
    return f"{table(headings, rows)}\n\n{caption}"


def draw_rungs(records: Sequence[Record], path: Path) -> None:
    """Draw skill over the number of steps, a panel for each group of tasks.

    Raises: ImportError if matplotlib is not installed.
    """
    panels = {}
    for group, found in _grouped(records).items():
        rungs = [name for name in found[0].variants if name not in BASELINES]
        lines = {
            series: sorted(
                (found[0].variants[rung]["steps"], *_spread(found, rung))
                for rung in rungs
                if rung.rpartition(", ")[0] == series
            )
            for series in SERIES
        }
        count = _count(found)
        panels[f"{group} ({count} task{'s' * (count > 1)})"] = lines
    layout = Layout(
        columns=len(panels), across="denoising steps", up="mean skill", ticks=(1, 2, 4, 8, 16, 50)
    )
    draw_panels(panels, path, layout=layout)


def newest_arithmetic(records: Sequence[Record]) -> Record | None:
    """Give the newest record of arithmetic, if there is one."""
    found = [record for record in records if record.kind == ARITHMETIC]
    return max(found, key=lambda record: record.date) if found else None


def _grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    grouped = {g: [r for r in records if g in ("all", group_of(r))] for g in GROUPS}
    return {name: found for name, found in grouped.items() if found}


def _count(records: Sequence[Record]) -> int:
    return len({record.case for record in records})


def _spread(records: Sequence[Record], rung: str) -> tuple[float, float, float]:
    """Give mean, least and greatest over seeds of the mean skill over tasks that all seeds have."""
    skills = find_skills(records)
    by_task = [values for (_, name, _), values in skills.items() if name == rung]
    seeds: set[int] = set.intersection(*map(set, by_task))
    means = [_mean([values[seed] for values in by_task]) for seed in sorted(seeds)]
    means = means or [_mean([_mean(list(values.values())) for values in by_task])]
    return _mean(means), min(means), max(means)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _skill(records: Sequence[Record], rung: str) -> str:
    mean, low, high = _spread(records, rung)
    return f"{mean:.2f}" if low == high else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _median(records: Sequence[Record], rung: str, key: str) -> float:
    return float(np.median([record.variants[rung][key] for record in records]))


def _tera(value: float) -> str:
    unit, name = next((u, n) for u, n in UNITS if value >= u or n == "GFLOP")
    return f"{value / unit:.3g} {name}"


def _caption(records: Sequence[Record]) -> str:
    first: Mapping[str, object] = records[0].settings
    seeds = len({record.settings["seed"] for record in records})
    return (
        f"Mean skill over tasks (least to greatest over {seeds} seed{'s' * (seeds > 1)}); "
        f"{first['shots']} pairs, {first['size']}x{first['size']} pixels, {first['test']} test "
        f"images each, {first['steps']} updates; median ms an image in plain PyTorch, from pixels "
        f"to pixels; GFLOP of the denoiser. {records[0].machine['cpu']}, base {first['base']} "
        f"{first['revision']}, commit {records[0].commit or 'unknown'}."
    )
