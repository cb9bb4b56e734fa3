"""`fewshot-rt predict`: one answer for every image of a folder."""

import time
from pathlib import Path

import click

from fewshot_rt.predict import plan, predict

from .models import open_model
from .options import FOLDER, json_option, runs_option, write_result
from .progress import meter, say

MOST_LISTED = 10


@click.command("predict")
@click.argument("source", metavar="DIR", type=FOLDER)
@click.option("--model", type=FOLDER, help="Bundle or run.  [default: the newest of runs/latest]")
@click.option(
    "--out", type=FOLDER, default=Path("answers"), show_default=True, help="Where answers go."
)
@click.option("--overwrite", is_flag=True, help="Answer again what is answered already.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: as trained]")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@runs_option
@json_option
def command(
    source: Path,
    model: Path | None,
    out: Path,
    overwrite: bool,
    steps: int | None,
    device: str,
    runs: Path,
    as_json: bool,
) -> int:
    """Answer every image in a folder and its sub-folders.

    DIR may also be one image. Answers are PNG files of the images' own sizes under the same
    relative names. Images that cannot be read are reported and skipped; answers that are there are
    kept, so an interrupted run goes on where it stopped.
    """
    jobs = plan(source, out)
    started = time.monotonic()
    predictor, place = open_model(model, runs, device=device, steps=steps)
    say(f"model: {place}")
    counts = {"done": 0, "kept": 0, "failed": 0}
    failed: list[dict[str, str]] = []
    with meter("predict") as shown:
        for number, result in enumerate(predict(predictor, jobs, overwrite=overwrite), start=1):
            counts[result.status] += 1
            if result.status == "failed":
                failed.append({"image": str(result.job.source), "error": result.error})
            shown.show(number / len(jobs), f"{number} of {len(jobs)}")
    seconds = time.monotonic() - started
    for item in failed[:MOST_LISTED]:
        say(f"failed: {item['error']}")
    if len(failed) > MOST_LISTED:
        say(f"failed: {len(failed) - MOST_LISTED} more")
    say(
        f"{counts['done']} answered, {counts['kept']} kept as they were, "
        f"{counts['failed']} failed "
        f"in {seconds:.1f} s: {out}"
    )
    write_result(
        {"out": out, "model": place, **counts, "failures": failed, "seconds": round(seconds, 3)},
        as_json=as_json,
    )
    return 1 if failed else 0
