"""`fewshot-rt predict`: one answer for every image of a folder."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fewshot_rt.errors import ConfigError, unknown
from fewshot_rt.predict import Answered, Job, plan, predict
from fewshot_rt.predictor import NOISES, Predictor
from fewshot_rt.sample import SOLVERS
from fewshot_rt.samples import FOLDER as MAPS
from fewshot_rt.tiles import Tiling

from .models import open_plain, steer
from .options import (
    FOLDER,
    acceleration_option,
    json_option,
    runs_option,
    steps_option,
    write_result,
)
from .progress import meter, say

MOST_LISTED = 10


@click.command("predict")
@click.argument("source", metavar="DIR", type=FOLDER)
@click.option("--model", type=FOLDER, help="Bundle or run.  [default: the newest of runs/latest]")
@click.option(
    "--out", type=FOLDER, default=Path("answers"), show_default=True, help="Where answers go."
)
@click.option("--overwrite", is_flag=True, help="Answer again what is answered already.")
@steps_option
@click.option(
    "--noise",
    type=click.Choice(NOISES),
    help="Where steps begin.  [default: as --steps auto has it, else as trained]",
)
@click.option(
    "--solver",
    type=click.Choice(SOLVERS),
    help="How steps are taken; dpm is DPM-Solver++ of the second order.  [default: euler]",
)
@click.option(
    "--drop-after",
    type=click.IntRange(1),
    metavar="STEPS",
    help="Keep only the first and the last latent frame after so many steps (large bases).",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--hint",
    type=click.Choice(["latency", "throughput"]),
    help="What a bundle of openvino favours: each image, or a full batch.  [default: latency]",
)
@click.option(
    "--offload", is_flag=True, help="Bring a large base's blocks to the GPU one by one: slower."
)
@acceleration_option
@click.option("--tile", is_flag=True, help="Answer by windows, at the images' own resolution.")
@click.option(
    "--overlap",
    type=float,
    metavar="SHARE",
    help=f"Share of a window that the next covers too.  [default: {Tiling.overlap}]",
)
@click.option(
    "--samples",
    type=click.IntRange(2),
    metavar="N",
    help="Answer from N noises: their mean, and a map of where they disagree.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME",
    help="Of a bundle that holds several, one or more: answers of each go to OUT/NAME.  [default: "
    "the first]",
)
@runs_option
@json_option
def command(
    source: Path,
    model: Path | None,
    out: Path,
    overwrite: bool,
    tile: bool,
    overlap: float | None,
    samples: int | None,
    adapters: tuple[str, ...],
    steps: int | None,
    runs: Path,
    as_json: bool,
    **way: Any,
) -> int:
    """Answer every image in a folder and its sub-folders.

    DIR may also be one image. Answers are PNG files of the images' own sizes under the same
    relative names. Images that cannot be read are reported and skipped; answers that are there are
    kept, so an interrupted run goes on where it stopped.

    Images are resized to the model's size, and details smaller than its pixels are lost. With
    --tile they are not resized: overlapping windows of the model's size are answered and their
    answers blended, so that large images keep full detail. Train for it on pairs that are crops of
    the model's size at the same magnification. Smaller images are continued by their mirror image.

    With --samples the answer is the mean of N (of labels, the class for which they speak most), and
    the folder disagreement/ of --out has a gray PNG of the same name, bright where they disagree:
    for pictures and gray, their standard deviation, where 255 is 0.125 or more of pixels from 0 to
    1; for masks and labels, the share of samples that differ from the answer, where 255 is all. An
    answer is kept only if this file is there, too. Train for it with --objective diffusion or grid.

    With --adapter, given several times, one bundle answers several tasks: adapters change in place.
    """
    tiling = _tiling(tile, overlap, samples)
    is_sampled = samples is not None
    # Without a choice of adapters there is one, and no name for it.
    places = {name: out / name for name in adapters} or {"": out}
    jobs = {name: plan(source, to, is_sampled=is_sampled) for name, to in places.items()}
    started = time.monotonic()
    predictor, place, way = open_plain(model, runs, **way)
    _require_adapters(predictor, adapters, place)
    say(f"model: {place}")
    way |= {"steps": steps, "is_sampled": is_sampled}
    options = {"overwrite": overwrite, "tiling": tiling, "samples": samples}
    results = _answers(predictor, jobs, way=way, options=options)
    counts, failed = _count(results, sum(map(len, jobs.values())))
    seconds = time.monotonic() - started
    _say_done(counts, failed, seconds=seconds, places=places.values(), samples=samples)
    summary = {
        "out": out,
        "model": place,
        "adapters": list(adapters),
        "tiling": asdict(tiling) if tiling else None,
        "samples": samples,
        **counts,
        "failures": failed,
        "seconds": round(seconds, 3),
    }
    write_result(summary, as_json=as_json)
    return 1 if failed else 0


def _answers(
    predictor: Predictor,
    jobs: Mapping[str, Sequence[Job]],
    *,
    way: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Iterator[Answered]:
    """Answer the jobs of each adapter; one without a name is the one that is there.

    way: see `steer`. options: see `predict`.
    """
    for name, planned in jobs.items():
        if name:
            predictor.use(name)
        yield from predict(steer(predictor, **way), planned, **options)


def _require_adapters(predictor: Predictor, adapters: Sequence[str], place: Path) -> None:
    """Require that a model has the adapters, before any image is answered. Raises: ConfigError."""
    if adapters and not predictor.adapters:
        raise ConfigError(
            f"{place} holds one adapter and is called without --adapter. Bundles of the engines "
            "aoti and inductor can hold several: fewshot-rt export --into BUNDLE."
        )
    for name in adapters:
        if name not in predictor.adapters:
            raise ConfigError(unknown("adapter", name, predictor.adapters))


def _count(results: Iterator[Answered], total: int) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Count what became of the images, by status, and list those that failed."""
    counts = {"done": 0, "kept": 0, "failed": 0}
    failed: list[dict[str, str]] = []
    with meter("predict") as shown:
        for number, result in enumerate(results, start=1):
            counts[result.status] += 1
            if result.status == "failed":
                failed.append({"image": str(result.job.source), "error": result.error})
            shown.show(number / total, f"{number} of {total}")
    return counts, failed


def _tiling(tile: bool, overlap: float | None, samples: int | None) -> Tiling | None:
    """Make of the flags what they mean together. Raises: UsageError, ConfigError."""
    if tile and samples:
        raise click.UsageError("windows are not sampled: give --tile or --samples, not both.")
    if overlap is None:
        return Tiling() if tile else None
    if not tile:
        raise click.UsageError("--overlap is a share of a window: give --tile with it.")
    return Tiling(overlap=overlap)


def _say_done(
    counts: dict[str, int],
    failed: list[dict[str, str]],
    *,
    seconds: float,
    places: Iterable[Path],
    samples: int | None,
) -> None:
    for item in failed[:MOST_LISTED]:
        say(f"failed: {item['error']}")
    if len(failed) > MOST_LISTED:
        say(f"failed: {len(failed) - MOST_LISTED} more")
    done, kept, number = (counts[status] for status in ("done", "kept", "failed"))
    where = ", ".join(map(str, places))
    say(f"{done} answered, {kept} kept as they were, {number} failed in {seconds:.1f} s: {where}")
    if samples:
        say(f"where the {samples} samples disagree: the folder {MAPS} there")
