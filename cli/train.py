"""`fewshot-rt train`: from a folder of pairs to a run."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fewshot_rt.config import make, read_mapping
from fewshot_rt.errors import ConfigError
from fewshot_rt.ladder import CURVE_FILE
from fewshot_rt.runs import newest_run, read_run
from fewshot_rt.train_config import TrainConfig

from .models import place_run
from .options import FOLDER, json_option, make_settings, runs_option, settings_options, write_result
from .progress import meter, say

if TYPE_CHECKING:
    from fewshot_rt.train import TrainStep


@click.command("train")
@click.argument("pairs", type=FOLDER)
@click.option("--name", help="Name of the run.  [default: folder and time]")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run: NAME, or the newest.")
@click.option("--overwrite", is_flag=True, help="Replace a run of the same name.")
@runs_option
@settings_options(TrainConfig)
@json_option
def command(
    pairs: Path,
    name: str | None,
    resume: bool,
    overwrite: bool,
    runs: Path,
    config: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Learn a task from the pairs in a folder.

    PAIRS holds input/ and target/ with images of the same names (or pairs.csv, pairs.jsonl). The
    run is written to runs/NAME, and runs/latest points to it: adapter, settings, metrics, and
    panels that show how the answers come about. An interrupted run goes on with --resume.

    At the end 1, 2, 4, 8 and 16 denoising steps are tried on pairs that were not trained on, and
    the run answers with the fewest that are as good as the best: steps.json, panels/steps.png.

    \b
    On several GPUs, each process draws batches of its own and all step as one:
    torchrun --standalone --nproc-per-node 2 --local-ranks-filter 0 \\
        --no-python fewshot-rt train PAIRS --name NAME
    (or accelerate launch --multi_gpu --num_processes 2 --no_python ...)
    """
    given = make_settings(TrainConfig, config, flags)
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    name = name or (newest_run(runs).name if resume else _fresh_name(pairs))
    folder = place_run(runs, name, resume=resume, overwrite=overwrite)
    settings = _resumed(folder, config, flags) if resume else given
    started = time.monotonic()
    from fewshot_rt.fit import fit

    with meter("train") as shown:
        for step in fit(pairs, folder, settings, overwrite=overwrite):
            if step.stage == "train":
                last = step
            left = step.seconds_left if step.gradient_norm else None
            shown.show(step.progress, _note(step), seconds_left=left)
    seconds = time.monotonic() - started
    say(f"trained {last.step} steps in {seconds:.0f} s: {folder}")
    tried = _tried(folder)
    say(f"look at   {folder / 'panels'}\nnext      fewshot-rt export, or fewshot-rt predict DIR")
    write_result(
        {
            "run": folder,
            "steps": last.step,
            "loss": last.loss,
            "recommended_steps": tried and tried["recommended_steps"],
            "seconds": round(seconds, 1),
        },
        as_json=as_json,
    )


def _note(step: "TrainStep") -> str:
    if step.stage == "try":
        return f"tried {step.step} denoising steps"
    if not step.gradient_norm:
        return "encoded"
    return f"{step.stage} step {step.step}  loss {step.loss:.4f}".removeprefix("train ")


def _tried(folder: Path) -> dict[str, Any] | None:
    """Say what trying numbers of denoising steps brought, if any were tried."""
    if not (folder / CURVE_FILE).is_file():
        return None
    tried = read_mapping(folder / CURVE_FILE)
    rung = next(
        rung
        for rung in tried["tried"]
        if (rung["steps"], rung["noise"]) == (tried["recommended_steps"], tried["noise"])
    )
    steps, metric = tried["recommended_steps"], tried["metric"]
    images = f"{tried['images']} {'held-out' if tried['is_held_out'] else 'trained-on'}"
    say(
        f"answers in {steps} step{'s' * (steps > 1)} from {tried['noise']} noise: {metric} "
        f"{rung['scores'][metric]:.3g} on {images} image{'s' * (tried['images'] > 1)}"
    )
    return tried


def _fresh_name(pairs: Path) -> str:
    return f"{pairs.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _resumed(folder: Path, config: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """Take the settings of a run that goes on, changed by the file and flags that are given."""
    given = read_mapping(config) if config else {}
    given |= {name: flag for name, flag in flags.items() if flag is not None}
    # Before pairs were held out, none were.
    return make(TrainConfig, {"hold_out": 0} | read_run(folder)["train"] | given)
