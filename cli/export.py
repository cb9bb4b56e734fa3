"""`fewshot-rt export`: from a run to a bundle that an engine runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fewshot_rt.runs import open_exact

from .models import find_run
from .options import FOLDER, acceleration_option, json_option, runs_option, write_result
from .progress import meter, say

STAGES = 13  # four a role, three roles, and the whole way


@click.command("export")
@click.argument("run", type=FOLDER, required=False)
@click.option("--engine", default="onnx", show_default=True, help="Engine to build for.")
@click.option("--precision", default="fp32", show_default=True, help="Arithmetic of the bundle.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda: where it will run.")
@click.option(
    "--out", type=FOLDER, help="Folder of the bundle.  [default: RUN/bundles/ENGINE-PRECISION]"
)
@click.option(
    "--into",
    type=FOLDER,
    metavar="BUNDLE",
    help="Add the adapter to a bundle of the same base (aoti, inductor); nothing is compiled.",
)
@click.option("--name", help="Of the adapter, in such a bundle.  [default: the run's]")
@acceleration_option
@runs_option
@json_option
def command(
    run: Path | None,
    engine: str,
    precision: str,
    device: str,
    out: Path | None,
    into: Path | None,
    name: str | None,
    acceleration: tuple[str, ...],
    runs: Path,
    as_json: bool,
) -> None:
    """Freeze a run for fast answers.

    RUN is a run's folder or name (default: the latest). The adapter is merged, each part of the
    model is captured and built for the engine, and compared with PyTorch: nothing is written that
    answers otherwise. `fewshot-rt predict` then takes the bundle by itself.

    Bundles of the engines aoti and inductor hold a base and any number of adapters: add others with
    --into, and choose among them with `fewshot-rt predict --adapter NAME`.
    """
    if into and out:
        raise click.UsageError("--into adds to a bundle, --out makes one: give one of them.")
    place = find_run(run, runs)
    folder = into or out or place / "bundles" / f"{engine}-{precision}"
    from fewshot_rt.export.bundle import read_manifest
    from fewshot_rt.export.engine import require_engine

    if into:
        manifest = read_manifest(into)
        engine, precision = manifest["engine"], manifest["precision"]
    require_engine(engine)
    from fewshot_rt.export.build import add_adapter, export_bundle

    base, adapter, values = open_exact(place, device=device, acceleration=acceleration)
    recipe = values["recipe"]
    if acceleration:  # these LoRAs know noise alone
        recipe = replace(recipe, noise="seeded", trained_noise="seeded")
    known = place.resolve().name
    shared: dict[str, Any] = {
        "recipe": recipe,
        "prompt": values["prompt"],
        "folder": folder,
        "origin": {
            "run": known,
            "task_digest": adapter.provenance.digest,
            "acceleration": [file.to_dict() for file in values["acceleration"]],
        },
    }
    named = (name or known, adapter)
    if into:
        steps = add_adapter(base, named, **shared)
    else:
        steps = export_bundle(base, engine=engine, precision=precision, adapter=named, **shared)
    parity = _watch(steps, engine)
    worst = max(parity.values())
    say(f"exported: {folder} (differs from PyTorch by {worst:.1e} relative, at most)")
    say("next      fewshot-rt predict DIR")
    write_result({"bundle": folder, "engine": engine, "parity": parity}, as_json=as_json)


def _watch(steps: Iterator[Any], engine: str) -> dict[str, float]:
    """Show what is done; give the worst relative error of each role."""
    parity: dict[str, float] = {}
    with meter(f"export {engine}") as shown:
        for index, step in enumerate(steps, start=1):
            shown.show(min(1.0, index / STAGES), f"{step.role}: {step.stage}")
            if step.parity:
                parity[step.role] = max(p.rel_l2 for p in step.parity.values())
    return parity
