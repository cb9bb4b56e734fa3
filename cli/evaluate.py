"""`fewshot-rt eval`: how good a model is on pairs, beside the baselines."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .models import find_model, open_model
from .options import FOLDER, json_option, runs_option, steps_option, write_result
from .progress import say, show_scores

if TYPE_CHECKING:
    from fewshot_rt.task import Pair


@click.command("eval")
@click.argument("pairs", type=FOLDER)
@click.option("--model", type=FOLDER, help="Bundle or run.  [default: the newest of runs/latest]")
@click.option("--panel", type=FOLDER, help="Write a picture: input | answer | target rows.")
@steps_option
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@runs_option
@json_option
def command(
    pairs: Path,
    model: Path | None,
    panel: Path | None,
    steps: int | None,
    device: str,
    runs: Path,
    as_json: bool,
) -> None:
    """Measure a model on pairs that it has not seen.

    PAIRS is a folder of pairs; its test split is taken if it has one. The same metrics are given
    for the input itself, the mean target, the target of the nearest pair and, for masks, Otsu's
    threshold. Where the training had the same test pairs, it chose the number of steps on some of
    them.
    """
    from fewshot_rt.evaluate import evaluate
    from fewshot_rt.task import Task

    task = Task.load(pairs)
    place = find_model(model, runs)
    predictor, place = open_model(place, runs, device=device, steps=steps)
    result = evaluate(predictor, task, known=_trained_on(place), panel=panel)
    show_scores(result.scores, title=f"{place}, mean over {result.images} images")
    if not result.is_held_out:
        say("warning: the model was trained on some of these images")
    say(f"{result.images_per_second:.1f} images a second, from pixels to pixels")
    if panel:
        say(f"picture: {panel}")
    write_result({"model": place, "panel": panel, **asdict(result)}, as_json=as_json)


def _trained_on(place: Path) -> "tuple[Pair, ...]":
    """Give the pairs that a run, or a bundle inside a run, was trained on, if they still exist."""
    from fewshot_rt.runs import TASK_FILE, read_run
    from fewshot_rt.task import Task

    for folder in (place, *place.resolve().parents[:2]):
        if (folder / TASK_FILE).is_file():
            pairs = Task.from_dict(read_run(folder)["task"]).pairs
            return pairs if all(p.source.exists() and p.target.exists() for p in pairs) else ()
    return ()
