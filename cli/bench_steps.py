"""`fewshot-rt bench steps`: what each rung of the ladder answers, in how much time."""

from pathlib import Path
from typing import Any

import click

from .bench_tasks import Numbers, pick_names
from .options import FOLDER, json_option, write_result
from .progress import meter, say

# Perception, pictures where one answer is right or many are, and places.
DEFAULT = (
    "edges,scene-depth,scene-silhouette,coin-masks,nuclei,denoising,colouring,inpainting,mirror"
)


@click.command("steps")
@click.option("--tasks", help=f"Names with commas.  [default: {DEFAULT}, as far as they are there]")
@click.option("--shots", type=click.IntRange(1), default=10, show_default=True, help="Pairs.")
@click.option("--seeds", type=Numbers(0), default="0,1,2", show_default=True, help="Random seeds.")
@click.option("--base", default="pocket", show_default=True, help="The base to judge.")
@click.option("--size", default=128, show_default=True, help="Side of the images.")
@click.option("--steps", default=250, show_default=True, help="Updates of each training.")
@click.option(
    "--test", type=click.IntRange(1), default=16, show_default=True, help="Images of each task."
)
@click.option("--nuclei", type=FOLDER, help="Folder of nuclei and masks, as one more task.")
@click.option("--results", type=FOLDER, help="Add records there, and leave out what they hold.")
@json_option
def command(
    tasks: str | None,
    shots: int,
    seeds: tuple[int, ...],
    nuclei: Path | None,
    results: Path | None,
    as_json: bool,
    **protocol: Any,
) -> None:
    """Climb down from fifty denoising steps to one, on the same pairs.

    The paper's objective in 50 to 1 steps, with two solvers; adapters trained for four steps or for
    one; and adapters that taught themselves (`distill`). With --results, every cell is a record,
    the table and the picture are made of all of them, and a broken-off run goes on.
    """
    from fewshot_rt.benchmarks.learning import Cell, Protocol
    from fewshot_rt.benchmarks.plots import require_plots
    from fewshot_rt.benchmarks.record import append_record, read_records
    from fewshot_rt.benchmarks.rungs import measure_arithmetic, run_rungs
    from fewshot_rt.benchmarks.rungs_tables import (
        draw_rungs,
        latest_rungs,
        make_arithmetic_table,
        make_rungs_table,
        newest_arithmetic,
    )
    from fewshot_rt.benchmarks.tasks import TASKS
    from fewshot_rt.benchmarks.tasks import nuclei as make_nuclei

    cases = dict(TASKS)
    if nuclei:
        cases["nuclei"] = make_nuclei(nuclei)
    own = ",".join(name for name in DEFAULT.split(",") if name in cases)
    chosen = pick_names(tasks or own, list(cases), "task")
    if results:
        require_plots()
    known = read_records(results) if results else []
    records = list(known)
    arithmetic = newest_arithmetic(known)
    if arithmetic is None:
        arithmetic = measure_arithmetic()
        if results:
            append_record(arithmetic, results)
    cells = [Cell(cases[name], shots, seed) for seed in seeds for name in chosen]
    with meter("bench") as shown:
        runs = run_rungs(cells, Protocol(**protocol), known=known)
        for number, (cell, record) in enumerate(runs, start=1):
            if record and results:
                append_record(record, results)
            records += [record] if record else []
            shown.show(number / len(cells), f"{cell.case.name}, seed {cell.seed}")
    together = latest_rungs(records)
    tables = {"rungs": make_rungs_table(together), "arithmetic": make_arithmetic_table(arithmetic)}
    for text in tables.values():
        say(f"{text}\n")
    if results:
        draw_rungs(together, results / "steps.png")
        say(f"picture: {results / 'steps.png'}")
    write_result({"tables": tables, "cells": len(together)}, as_json=as_json)
