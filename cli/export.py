"""`fewshot-rt export`: from a run to a bundle that an engine runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fewshot_rt.runs import open_exact

from .models import find_run
from .options import FOLDER, acceleration_option, json_option, runs_option, write_result
from .progress import meter, say

STAGES = 15  # four a role, three roles, and three for the whole way

if TYPE_CHECKING:
    from fewshot_rt.adapter import Adapter
    from fewshot_rt.base import Base
    from fewshot_rt.images import Pixels


@click.command("export")
@click.argument("run", type=FOLDER, required=False)
@click.option(
    "--engine", help="Engine to build for.  [default: the fastest that this machine can run]"
)
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
@click.option(
    "--single-file",
    "is_single",
    is_flag=True,
    help="Write one ONNX file from image to answer, for whatever runs ONNX; no bundle.",
)
@click.option("--name", help="Of the adapter, in such a bundle.  [default: the run's]")
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="Images that a call holds at most.  [default: the run's]",
)
@acceleration_option
@runs_option
@json_option
def command(
    run: Path | None,
    engine: str | None,
    precision: str,
    device: str,
    out: Path | None,
    into: Path | None,
    is_single: bool,
    name: str | None,
    batch: int | None,
    acceleration: tuple[str, ...],
    runs: Path,
    as_json: bool,
) -> None:
    """Freeze a run for fast answers.

    RUN is a run's folder or name (default: the latest). The adapter is merged, each part of the
    model is captured and built for the engine, and compared with PyTorch: nothing is written that
    answers otherwise. In fewer bits than fp32, answers to the run's own pairs must be as good, too.
    `fewshot-rt predict` then takes the bundle by itself.

    Bundles of the engines aoti and inductor hold a base and any number of adapters: add others with
    --into, and choose among them with `fewshot-rt predict --adapter NAME`.

    With --single-file, all is one ONNX file (default: RUN/bundles/onnx-PRECISION.onnx) that takes
    and gives pixels, in fp32 or int8, and needs nothing of fewshot-rt.
    """
    if into and (out or batch):
        flag = "--out" if out else "--batch"
        raise click.UsageError(f"--into adds to a bundle, {flag} is for a new one: leave one out.")
    place = find_run(run, runs)
    if is_single:
        _require_single(engine, precision, device=device, out=out, into=into, batch=batch)
        path = out or place / "bundles" / f"onnx-{precision}.onnx"
        result = _write_single(place, path, precision=precision, acceleration=acceleration)
        write_result(result, as_json=as_json)
        return
    engine, precision = _choose(engine, precision, device=device, into=into)
    folder = into or out or place / "bundles" / f"{engine}-{precision}"
    from fewshot_rt.export.build import add_adapter, export_bundle
    from fewshot_rt.export.bundle import read_recipe

    batch = read_recipe(into).batch if into else batch
    base, adapter, shared = _open(
        place, precision, device=device, acceleration=acceleration, batch=batch
    )
    named = (name or place.resolve().name, adapter)
    if into:
        steps = add_adapter(base, named, folder=folder, **shared)
    else:
        way: dict[str, Any] = {"engine": engine, "precision": precision, "folder": folder}
        steps = export_bundle(base, adapter=named, **way, **shared)
    parity, quality = _watch(steps, engine)
    worst = max(parity.values())
    say(f"exported: {folder} (differs from PyTorch by {worst:.1e} relative, at most)")
    _say_quality(quality)
    say("next      fewshot-rt predict DIR")
    result = {"bundle": folder, "engine": engine, "precision": precision}
    write_result(result | {"parity": parity, "quality": quality}, as_json=as_json)


def _require_single(
    engine: str | None,
    precision: str,
    *,
    device: str,
    out: Path | None,
    into: Path | None,
    batch: int | None,
) -> None:
    """Require that nothing is asked for that one file cannot have. Raises: UsageError."""
    asked = {"--engine": engine or "onnx", "--precision": precision, "--device": device}
    possible = {"--engine": ("onnx",), "--precision": ("fp32", "int8"), "--device": ("cpu",)}
    for flag, choices in possible.items():
        if asked[flag] not in choices:
            raise click.UsageError(
                f"--single-file is made with {flag} {' or '.join(choices)} alone, not "
                f"{asked[flag]}; it runs on whatever runs ONNX. Leave out {flag}, or --single-file."
            )
    if into:
        raise click.UsageError("--into adds to a bundle, and --single-file makes none.")
    if batch:
        raise click.UsageError("--single-file takes any number of images: leave out --batch.")
    if out and out.suffix != ".onnx":
        raise click.UsageError(f"--out {out}: the one file needs a name that ends in .onnx.")


def _write_single(
    place: Path, path: Path, *, precision: str, acceleration: tuple[str, ...]
) -> dict[str, Any]:
    """Write a run as one file; give the result."""
    from fewshot_rt.export.single import export_single

    base, adapter, shared = _open(place, precision, device="cpu", acceleration=acceleration)
    steps = export_single(base, adapter=adapter, path=path, precision=precision, **shared)
    parity, quality = _watch(steps, "onnx", stages=5)
    size = path.stat().st_size
    say(f"exported: {path} ({size / 1e6:.1f} MB)")
    if parity:
        say(f"parity    differs from PyTorch by {parity['answer']:.1e} relative, at most")
    _say_quality(quality)
    say('next      onnxruntime in any language: see the README, "One file"')
    return {"file": path, "size_bytes": size, "parity": parity, "quality": quality}


def _say_quality(quality: dict[str, Any] | None) -> None:
    if quality:
        beside = f"(in PyTorch {quality['eager']:.4g}), on {quality['images']} pairs of the run"
        say(f"quality   {quality['metric']} {quality['engine']:.4g} {beside}")


def _choose(
    engine: str | None, precision: str, *, device: str, into: Path | None
) -> tuple[str, str]:
    """Settle engine and precision: what is there already, what is asked for, or the fastest."""
    from fewshot_rt.export.engine import fastest_engine, require_engine

    if into:
        from fewshot_rt.export.bundle import read_manifest

        manifest = read_manifest(into)
        engine, precision = manifest["engine"], manifest["precision"]
    if engine is None:
        engine = fastest_engine(device, precision)
        say(f"engine    {engine}, the fastest that this machine can run (--engine takes others)")
    require_engine(engine)
    return engine, precision


def _open(
    place: Path,
    precision: str,
    *,
    device: str,
    acceleration: tuple[str, ...],
    batch: int | None = None,
) -> "tuple[Base, Adapter, dict[str, Any]]":
    """Open a run for what is built of it; give base, adapter, and what all ways to build take."""
    base, adapter, values = open_exact(place, device=device, acceleration=acceleration)
    recipe = replace(values["recipe"], batch=batch or values["recipe"].batch)
    if acceleration:  # these LoRAs know noise alone
        recipe = replace(recipe, noise="seeded", trained_noise="seeded")
    shared = {
        "recipe": recipe,
        "prompt": values["prompt"],
        "pairs": [] if precision == "fp32" else _read_pairs(values),
        "origin": {
            "run": place.resolve().name,
            "task_digest": adapter.provenance.digest,
            "acceleration": [file.to_dict() for file in values["acceleration"]],
        },
    }
    return base, adapter, shared


def _read_pairs(values: dict[str, Any]) -> "list[tuple[Pixels, Pixels]]":
    """Read pairs that the run learned from; none, which is said, if they are not there any more."""
    from fewshot_rt.export.quality import MOST_PAIRS
    from fewshot_rt.images import read_image
    from fewshot_rt.task import Task

    pairs = Task.from_dict(values["task"]).pairs[:MOST_PAIRS]
    gone = [path for pair in pairs for path in (pair.source, pair.target) if not path.is_file()]
    if gone:
        say(f"note: {gone[0]} is not there any more, so quality is not judged on the run's pairs")
        return []
    return [(read_image(pair.source), read_image(pair.target)) for pair in pairs]


def _watch(
    steps: Iterator[Any], engine: str, *, stages: int = STAGES
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Show what is done; give the worst relative error of each role, and the quality if judged."""
    parity: dict[str, float] = {}
    quality = None
    with meter(f"export {engine}") as shown:
        for index, step in enumerate(steps, start=1):
            shown.show(min(1.0, index / stages), f"{step.role}: {step.stage}")
            if step.parity:
                parity[step.role] = max(p.rel_l2 for p in step.parity.values())
            quality = step.quality.to_dict() if step.quality else quality
    return parity, quality
