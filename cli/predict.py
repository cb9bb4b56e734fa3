"""`fewshot-rt predict`: one answer for every image of a folder."""

import time
from dataclasses import asdict
from pathlib import Path

import click

from fewshot_rt.predict import plan, predict
from fewshot_rt.tiles import Tiling

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
@click.option(
    "--offload", is_flag=True, help="Bring a large base's blocks to the GPU one by one: slower."
)
@click.option("--tile", is_flag=True, help="Answer by windows, at the images' own resolution.")
@click.option(
    "--overlap",
    type=float,
    metavar="SHARE",
    help=f"Share of a window that the next covers too.  [default: {Tiling.overlap}]",
)
@runs_option
@json_option
def command(
    source: Path,
    model: Path | None,
    out: Path,
    overwrite: bool,
    steps: int | None,
    device: str,
    offload: bool,
    tile: bool,
    overlap: float | None,
    runs: Path,
    as_json: bool,
) -> int:
    """Answer every image in a folder and its sub-folders.

    DIR may also be one image. Answers are PNG files of the images' own sizes under the same
    relative names. Images that cannot be read are reported and skipped; answers that are there are
    kept, so an interrupted run goes on where it stopped.

    Images are resized to the model's size, and details smaller than its pixels are lost. With
    --tile they are not resized: overlapping windows of the model's size are answered and their
    answers blended, so that large images keep full detail. Things then appear as large as they are
    in the image's own pixels. Train for it on pairs that are crops of the model's size at the same
    magnification. Images smaller than a window are continued by their mirror image.
    """
    tiling = _tiling(tile, overlap)
    jobs = plan(source, out)
    started = time.monotonic()
    predictor, place = open_model(model, runs, device=device, steps=steps, offload=offload)
    say(f"model: {place}")
    counts = {"done": 0, "kept": 0, "failed": 0}
    failed: list[dict[str, str]] = []
    with meter("predict") as shown:
        results = predict(predictor, jobs, overwrite=overwrite, tiling=tiling)
        for number, result in enumerate(results, start=1):
            counts[result.status] += 1
            if result.status == "failed":
                failed.append({"image": str(result.job.source), "error": result.error})
            shown.show(number / len(jobs), f"{number} of {len(jobs)}")
    seconds = time.monotonic() - started
    _say_failed(failed)
    say(
        f"{counts['done']} answered, {counts['kept']} kept as they were, "
        f"{counts['failed']} failed "
        f"in {seconds:.1f} s: {out}"
    )
    summary = {
        "out": out,
        "model": place,
        "tiling": asdict(tiling) if tiling else None,
        **counts,
        "failures": failed,
        "seconds": round(seconds, 3),
    }
    write_result(summary, as_json=as_json)
    return 1 if failed else 0


def _tiling(tile: bool, overlap: float | None) -> Tiling | None:
    """Make of both flags what they mean together. Raises: UsageError, ConfigError."""
    if overlap is None:
        return Tiling() if tile else None
    if not tile:
        raise click.UsageError("--overlap is a share of a window: give --tile with it.")
    return Tiling(overlap=overlap)


def _say_failed(failed: list[dict[str, str]]) -> None:
    for item in failed[:MOST_LISTED]:
        say(f"failed: {item['error']}")
    if len(failed) > MOST_LISTED:
        say(f"failed: {len(failed) - MOST_LISTED} more")
