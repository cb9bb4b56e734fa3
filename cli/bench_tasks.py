"""`fewshot-rt bench tasks`: what is learned from how few pairs, beside rivals."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fewshot_rt.errors import ConfigError, unknown

from .options import FOLDER, json_option, write_result
from .progress import meter, say

if TYPE_CHECKING:
    from fewshot_rt.benchmarks.learning import Cell


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas: 1,3,10."""

    name = "numbers"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Read the numbers; wrong usage if one is none or too small."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers like 1,3,10", param, ctx)
        if min(numbers) < self.least:
            self.fail(f"{min(numbers)} is below {self.least}", param, ctx)
        return numbers


@click.command("tasks")
@click.option("--tasks", help="Names with commas.  [default: all]")
@click.option(
    "--shots", type=Numbers(1), default="1,3,10,30", show_default=True, help="Numbers of pairs."
)
@click.option("--seeds", type=Numbers(0), default="0,1,2", show_default=True, help="Random seeds.")
@click.option("--methods", help="Names with commas, ours first.  [default: all]")
@click.option("--base", default="pocket", show_default=True, help="The base to judge.")
@click.option("--size", default=128, show_default=True, help="Side of the images.")
@click.option("--steps", default=250, show_default=True, help="Updates of each training.")
@click.option("--unet-steps", default=150, show_default=True, help="Updates of the U-Net.")
@click.option(
    "--test",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Test images of each task.",
)
@click.option("--nuclei", type=FOLDER, help="Folder of nuclei and masks, as one more task.")
@click.option("--results", type=FOLDER, help="Add records there, and leave out what they hold.")
@click.option("--panels", type=FOLDER, help="Write input | answer | target of ours there.")
@click.option("--list", "is_list", is_flag=True, help="Only list tasks and methods.")
@json_option
def command(
    tasks: str | None,
    shots: tuple[int, ...],
    seeds: tuple[int, ...],
    methods: str | None,
    nuclei: Path | None,
    results: Path | None,
    panels: Path | None,
    is_list: bool,
    as_json: bool,
    **protocol: Any,
) -> None:
    """Learn many tasks from a few pairs and compare with rivals on the same pairs.

    Adapters on the base stand beside the same training from random weights (an adapter's, and all
    weights), a U-Net, a random forest for masks, and the baselines. With --results, every cell is a
    record, tables and curves are drawn from all of them, and a broken-off run goes on.
    """
    from fewshot_rt.benchmarks.learning import METHODS, Cell, Protocol, run_cells
    from fewshot_rt.benchmarks.plots import require_plots
    from fewshot_rt.benchmarks.record import append_record, read_records
    from fewshot_rt.benchmarks.tasks import TASKS
    from fewshot_rt.benchmarks.tasks import nuclei as make_nuclei

    cases = dict(TASKS)
    if nuclei:
        cases["nuclei"] = make_nuclei(nuclei)
    chosen = pick_names(tasks, list(cases), "task")
    which = pick_names(methods, list(METHODS), "method")
    if is_list:
        for name in chosen:
            say(f"{name}: {cases[name].about} ({cases[name].group}, {cases[name].metric})")
        say(f"methods: {', '.join(which)}")
        write_result({"tasks": chosen, "methods": which}, as_json=as_json)
        return
    if results:
        require_plots()
    cells = [Cell(cases[n], count, seed) for seed in seeds for count in shots for n in chosen]
    known = read_records(results) if results else []
    new = []
    with meter("bench") as shown:
        runs = run_cells(cells, Protocol(**protocol), methods=which, known=known, panels=panels)
        for number, (cell, record) in enumerate(runs, start=1):
            if record and results:
                append_record(record, results)
            if record:
                new.append(record)
            shown.show(number / len(cells), _told(cell))
    _report([*known, *new], results, as_json=as_json)


def pick_names(text: str | None, possible: list[str], what: str) -> list[str]:
    """Read names with commas; all that are possible if there is no text.

    Raises: ConfigError with the nearest name for one that is not.
    """
    if text is None:
        return possible
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in possible:
            raise ConfigError(unknown(what, name, possible))
    return names


def _told(cell: "Cell") -> str:
    return f"{cell.case.name}, {cell.shots} pairs, seed {cell.seed}"


def _report(records: list[Any], results: Path | None, *, as_json: bool) -> None:
    from fewshot_rt.benchmarks.curves import (
        draw_curves,
        latest_comparison,
        make_group_table,
        make_mean_table,
        make_task_table,
    )

    together = latest_comparison(records)
    mean = make_mean_table(together)
    say(mean)
    counts = sorted({int(record.settings["shots"]) for record in together})
    tables = {str(count): make_task_table(together, shots=count) for count in counts}
    groups = {str(count): make_group_table(together, shots=count) for count in counts}
    if results:
        draw_curves(together, results / "tasks.png")
        say(f"curves: {results / 'tasks.png'}")
    values = {"mean": mean, "groups": groups, "tables": tables, "cells": len(together)}
    write_result(values, as_json=as_json)
