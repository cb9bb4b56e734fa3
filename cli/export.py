"""`fewshot-rt export`: from a run to a bundle that an engine runs."""

from dataclasses import replace
from pathlib import Path

import click

from fewshot_rt.runs import open_merged

from .models import find_run
from .options import FOLDER, acceleration_option, json_option, runs_option, write_result
from .progress import meter, say


@click.command("export")
@click.argument("run", type=FOLDER, required=False)
@click.option("--engine", default="onnx", show_default=True, help="Engine to build for.")
@click.option("--precision", default="fp32", show_default=True, help="Arithmetic of the bundle.")
@click.option(
    "--out", type=FOLDER, help="Folder of the bundle.  [default: RUN/bundles/ENGINE-PRECISION]"
)
@acceleration_option
@runs_option
@json_option
def command(
    run: Path | None,
    engine: str,
    precision: str,
    out: Path | None,
    acceleration: tuple[str, ...],
    runs: Path,
    as_json: bool,
) -> None:
    """Freeze a run for fast answers.

    RUN is a run's folder or name (default: the latest). The adapter is merged, each part of the
    model is captured and built for the engine, and compared with PyTorch: nothing is written that
    answers otherwise. `fewshot-rt predict` then takes the bundle by itself.
    """
    place = find_run(run, runs)
    folder = out or place / "bundles" / f"{engine}-{precision}"
    from fewshot_rt.export.engine import require_engine

    require_engine(engine)
    from fewshot_rt.export.build import export_bundle

    base, adapter, values = open_merged(place, acceleration=acceleration)
    recipe = values["recipe"]
    if acceleration:  # these LoRAs know noise alone
        recipe = replace(recipe, noise="seeded", trained_noise="seeded")
    stages = 13  # four a role, three roles, and the whole way
    parity: dict[str, float] = {}
    with meter(f"export {engine}") as shown:
        steps = export_bundle(
            base,
            recipe=recipe,
            prompt=values["prompt"],
            engine=engine,
            precision=precision,
            folder=folder,
            origin={
                "run": place.resolve().name,
                "task_digest": adapter.provenance.digest,
                "acceleration": [file.to_dict() for file in values["acceleration"]],
            },
        )
        for index, step in enumerate(steps, start=1):
            shown.show(min(1.0, index / stages), f"{step.role}: {step.stage}")
            if step.parity:
                parity[step.role] = max(p.rel_l2 for p in step.parity.values())
    worst = max(parity.values())
    say(f"exported: {folder} (differs from PyTorch by {worst:.1e} relative, at most)")
    say("next      fewshot-rt predict DIR")
    write_result({"bundle": folder, "engine": engine, "parity": parity}, as_json=as_json)
