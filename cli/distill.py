"""`fewshot-rt distill`: a run learns to answer in fewer steps, from images without targets."""

import time
from pathlib import Path
from typing import Any

import click

from fewshot_rt.config import read_mapping
from fewshot_rt.distill_config import REPORT_FILE, DistillConfig
from fewshot_rt.errors import ConfigError

from .models import find_run, place_run
from .options import FOLDER, json_option, make_settings, runs_option, settings_options, write_result
from .progress import meter, say


@click.command("distill")
@click.argument("run", type=FOLDER)
@click.argument("images", type=FOLDER)
@click.option("--name", help="Name of the new run.  [default: RUN-STEPSsteps]")
@click.option("--resume", is_flag=True, help="Go on with an interrupted distillation.")
@click.option("--overwrite", is_flag=True, help="Replace a run of the same name.")
@runs_option
@settings_options(DistillConfig)
@json_option
def command(
    run: Path,
    images: Path,
    name: str | None,
    resume: bool,
    overwrite: bool,
    runs: Path,
    config: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Teach a run to answer in few steps as it does in many.

    RUN is a run of --objective diffusion or grid, by name or path; IMAGES is a folder of inputs
    like those that it will answer, without targets: ten or more. The run walks from noise to its
    answers in many steps; a copy of it learns to go there in few, and becomes a run of its own, to
    which runs/latest points.
    """
    settings = make_settings(DistillConfig, config, flags)
    teacher = find_run(run, runs)
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    name = name or f"{teacher.resolve().name}-{settings.steps}steps"
    folder = place_run(teacher.resolve().parent, name, resume=resume, overwrite=overwrite)
    started = time.monotonic()
    from fewshot_rt.distill import distill

    with meter("distill") as shown:
        for step in distill(teacher, images, folder, settings, overwrite=overwrite):
            learned = f"step {step.step}  loss {step.loss:.4f}" if step.gradient_norm else "walked"
            left = step.seconds_left if step.gradient_norm else None
            shown.show(step.progress, learned, seconds_left=left)
    report = read_mapping(folder / REPORT_FILE)
    say(f"distilled in {time.monotonic() - started:.0f} s: {folder}")
    say(
        f"answers in {settings.steps} steps differ by {report['error']:.4f} from those in "
        f"{settings.teacher_steps}, where they differed by {report['error_before']:.4f}"
    )
    write_result({"run": folder, **report}, as_json=as_json)
