"""`fewshot-rt bench start`: how long one image takes from the shell, by bundle."""

from pathlib import Path

import click

from fewshot_rt.errors import ModelError
from fewshot_rt.runs import bundles_of, read_run

from .models import find_run
from .options import FOLDER, json_option, runs_option, write_result
from .progress import say


@click.command("start")
@click.argument("run", type=FOLDER, required=False)
@click.option(
    "--rounds", type=click.IntRange(1), default=10, show_default=True, help="Processes of each."
)
@click.option("--results", type=FOLDER, help="Add the record to a file in this folder.")
@runs_option
@json_option
def command(run: Path | None, rounds: int, results: Path | None, runs: Path, as_json: bool) -> None:
    """Measure how long one image takes from the shell, and how large bundles are.

    RUN is a run's folder or name (default: the latest). Each of its bundles is opened by a new
    process that answers one image of the run's own pairs.
    """
    from fewshot_rt.benchmarks.record import append_record
    from fewshot_rt.benchmarks.starts import bench_starts, make_start_table
    from fewshot_rt.task import Task

    place = find_run(run, runs)
    bundles = {bundle.name: bundle for bundle in bundles_of(place)}
    if not bundles:
        raise ModelError(f"the run {place} has no bundles. Make one: fewshot-rt export.")
    image = Task.from_dict(read_run(place)["task"]).pairs[0].source
    record = bench_starts(bundles, image, rounds=rounds)
    table = make_start_table(record)
    say(table)
    if results:
        say(f"record: {append_record(record, results)}")
    write_result({"record": record.to_dict(), "table": table}, as_json=as_json)
