"""`fewshot-rt distill`: a run learns to answer in fewer steps, from images without targets."""

import time
from pathlib import Path
from typing import Any

import click

from fewshot_rt.config import read_mapping
from fewshot_rt.distill_config import REPORT_FILE, DistillConfig
from fewshot_rt.errors import ModelError
from fewshot_rt.runs import CONFIG_FILE

from .models import find_run
from .options import FOLDER, json_option, make_settings, runs_option, settings_options, write_result
from .progress import meter, say


@click.command("distill")
@click.argument("run", type=FOLDER)
@click.argument("images", type=FOLDER)
@click.option("--name", help="Name of the new run.  [default: RUN-STEPSsteps]")
@click.option("--overwrite", is_flag=True, help="Replace a run of the same name.")
@runs_option
@settings_options(DistillConfig)
@json_option
def command(
    run: Path,
    images: Path,
    name: str | None,
    overwrite: bool,
    runs: Path,
    config: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Teach a run to answer in few steps as it does in many.

    RUN is a run of --objective diffusion or grid, by name or path; IMAGES is a folder of inputs
    like those that it will answer, without targets. The run walks from noise to its answers in many
    steps; a copy of it learns to go there in few, and becomes a run of its own.
    """
    settings = make_settings(DistillConfig, config, flags)
    teacher = find_run(run, runs)
    folder = teacher.parent / (name or f"{teacher.resolve().name}-{settings.steps}steps")
    if (folder / CONFIG_FILE).exists() and not overwrite:
        raise ModelError(
            f"the run {folder} is there already. Replace it (--overwrite), or take another --name."
        )
    started = time.monotonic()
    from fewshot_rt.distill import distill
    from fewshot_rt.fit import remove_run

    if overwrite:
        remove_run(folder, keep=images)
    with meter("distill") as shown:
        for step in distill(teacher, images, folder, settings):
            note = f"step {step.step}  loss {step.loss:.4f}"
            left = step.seconds_left if step.gradient_norm else None
            shown.show(step.progress, note if left is not None else "walked", seconds_left=left)
    report = read_mapping(folder / REPORT_FILE)
    say(f"distilled in {time.monotonic() - started:.0f} s: {folder}")
    say(
        f"answers in {settings.steps} steps differ by {report['error']:.4f} from those in "
        f"{settings.teacher_steps}, where they differed by {report['error_before']:.4f}"
    )
    write_result({"run": folder, **report}, as_json=as_json)
