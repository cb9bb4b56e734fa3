"""`fewshot-rt bench latency`: how fast a run's bundles answer, beside plain PyTorch."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fewshot_rt.errors import ConfigError, DataError

from .models import find_run
from .options import FOLDER, json_option, runs_option, write_result
from .progress import say, show_table

if TYPE_CHECKING:
    import numpy as np

    from fewshot_rt.benchmarks.floor import Floor
    from fewshot_rt.benchmarks.record import Record


@click.command("latency")
@click.argument("run", type=FOLDER, required=False)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Images a call."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=20, show_default=True, help="Calls of each."
)
@click.option("--results", type=FOLDER, help="Add the record to a file in this folder.")
@runs_option
@json_option
def command(
    run: Path | None, batch: int, rounds: int, results: Path | None, runs: Path, as_json: bool
) -> None:
    """Measure how fast a run answers, by engine.

    RUN is a run's folder or name (default: the latest). In one interleaved run on the same images,
    each in a process of its own: the plain diffusers-style loop with the adapter attached, the
    merged model in PyTorch, and every bundle of the run. A way that answers otherwise is not timed.
    """
    from fewshot_rt.benchmarks.record import append_record
    from fewshot_rt.benchmarks.report import make_table

    record = _measure(find_run(run, runs), batch=batch, rounds=rounds)
    rows = [
        [name, *(f"{times[f'{key}_ms']:.1f}" for key in ("median", "p10", "p90", "first"))]
        for name, times in record.variants.items()
    ]
    show_table(["ms a call", "median", "p10", "p90", "first call"], rows)
    say(f"floor of this machine: {record.floor['floor_ms']:.1f} ms")
    if results:
        say(f"record: {append_record(record, results)}")
    write_result({"record": record.to_dict(), "table": make_table(record)}, as_json=as_json)


def _measure(place: Path, *, batch: int, rounds: int) -> "Record":
    from fewshot_rt.benchmarks.run import bench_predict
    from fewshot_rt.benchmarks.ways import EAGER, PLAIN, Apart, open_way
    from fewshot_rt.export.bundle import read_manifest, read_recipe
    from fewshot_rt.runs import bundles_of

    bundles = {bundle.name: bundle for bundle in bundles_of(place)}
    for name, bundle in bundles.items():
        most = read_recipe(bundle).batch
        if batch > most:
            raise ConfigError(
                f"bundle {name} holds {most} images a call. Give --batch {most} or less, or export "
                f"it with --batch {batch}."
            )
    # A large base is here while its arithmetic is counted, and gone before others open it.
    floor, images = _prepare(place, batch)
    with ExitStack() as opened:
        variants = {}
        for name in (PLAIN, EAGER, *bundles):
            variants[name] = Apart(name, partial(open_way, place, name, batch=batch))
            opened.callback(variants[name].close)
        return bench_predict(
            variants,
            images,
            case=f"predict-batch{batch}",
            floor=floor,
            precisions={name: read_manifest(path)["precision"] for name, path in bundles.items()},
            rounds=rounds,
        )


def _prepare(place: Path, batch: int) -> "tuple[Floor, np.ndarray]":
    """Count what an answer takes at least, and read images. Shapes: images [B, 3, H, W]."""
    from fewshot_rt.benchmarks.floor import find_floor
    from fewshot_rt.runs import base_predictor, open_merged

    merged, _, values = open_merged(place)
    recipe = replace(values["recipe"], batch=batch)
    images = _images(values["task"], recipe.size, batch)
    eager = base_predictor(merged, recipe, values["prompt"], origin="eager")
    return find_floor(merged, eager), images


def _images(task: dict[str, Any], size: tuple[int, int], count: int) -> "np.ndarray":
    """Take the inputs of the run's own pairs, again from the first when there are too few."""
    import numpy as np

    from fewshot_rt.images import read_image, to_model
    from fewshot_rt.task import Task

    paths = [pair.source for pair in Task.from_dict(task).pairs]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}, which the run was trained on, is not there any more.")
    return np.stack([to_model(read_image(paths[i % len(paths)]), size) for i in range(count)])
