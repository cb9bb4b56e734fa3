"""`fewshot-rt bench base`: how good a base is by itself."""

from pathlib import Path

import click

from .options import FOLDER, json_option, write_result
from .progress import say


@click.command("base")
@click.argument("base", default="pocket")
@click.option(
    "--clips", type=click.IntRange(2), default=16, show_default=True, help="Clips of each event."
)
@click.option(
    "--size", type=click.IntRange(32), help="Side of the events' clips.  [default: the native one]"
)
@click.option("--results", type=FOLDER, help="Add the records to a file in this folder.")
@json_option
def command(base: str, clips: int, size: int | None, results: Path | None, as_json: bool) -> None:
    """Measure BASE, pocket or a folder that `pretrain` wrote, before any adapter.

    What its autoencoder keeps of the world and of photographs, and how well one step plays each
    event of the world, on clips that pretraining never drew.
    """
    from fewshot_rt.bases import open_base
    from fewshot_rt.benchmarks.base_quality import measure_autoencoder, measure_events
    from fewshot_rt.benchmarks.record import append_record
    from fewshot_rt.benchmarks.report import make_table

    opened = open_base(base)
    records = [
        measure_autoencoder(opened, count=4 * clips),
        measure_events(opened, count=clips, size=size),
    ]
    tables = {record.case: make_table(record) for record in records}
    for record in records:
        say(f"{tables[record.case]}\n")
        if results:
            say(f"record: {append_record(record, results)}")
    write_result(
        {"records": [record.to_dict() for record in records], "tables": tables}, as_json=as_json
    )
