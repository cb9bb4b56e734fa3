"""TensorRT on a GPU: denoisers become engines, are compared with eager in fp32, and timed.

`make gpu-trt`, or `python -m fewshot_rt.benchmarks.gpu_trt`. First the base in the box in every
precision, then the paper's own at full size with random weights, in bf16. In bf16 there are three
engines: attention as it is chosen, TensorRT's everywhere, and ours wherever it can be. An adapter
is put into the first and taken out again. Without TensorRT or a GPU `--rehearse` does what needs
neither, at a tiny size: graphs are declared and checked, our attention is put into them, and
compiled for all architectures.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from fewshot_rt.bases import open_base
from fewshot_rt.cards import BOX, find_card
from fewshot_rt.errors import ConfigError, EngineError
from fewshot_rt.export import trt_runtime
from fewshot_rt.export.engine import missing_package
from fewshot_rt.export.engines import trt
from fewshot_rt.export.modelopt import INSTALL

from .gpu_bases import PAPER_BASE, Subject, find_subjects
from .gpu_compiled import open_random
from .gpu_table import REHEARSED
from .gpu_trt_ways import (
    EAGER,
    FEW,
    IN_REHEARSAL,
    MORE_WAYS,
    WAYS,
    Frozen,
    Progress,
    Way,
    adapt,
    build,
    note,
    rehearse,
    time_all,
)
from .gpu_units import Outcome, Stage, Unit, carry_out, run_units, words
from .markdown import table
from .record import Record

KIND = "gpu-trt"
MINUTES = 60.0
UNIT_SECONDS = 300.0  # less is not enough for any base


def measure(
    subject: Subject, ways: Mapping[str, Way], make: Callable[[], Any], stage: Stage
) -> Iterator[Record]:
    """Build a base in all ways, then time them in turns; or rehearse it. Gives one record.

    make: the base in fp32, where it runs.
    """
    frozen = Frozen(make(), subject, stage.device)
    progress = Progress()
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, way) in enumerate(ways.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            reason = missing_package("modelopt", install=INSTALL)
            if way.precision in trt.calibrated and reason:
                progress.skipped[name] = reason
            elif stage.is_rehearsal:
                note(progress, name, partial(rehearse, frozen, way, place))
            else:
                note(progress, name, partial(build, frozen, name, way, place, progress))
        if not stage.is_rehearsal:
            adapt(frozen, progress)
            time_all(frozen, progress, stage)
    yield _record(subject, frozen, progress, stage)


def _record(subject: Subject, frozen: Frozen, progress: Progress, stage: Stage) -> Record:
    facts = {} if stage.is_rehearsal else trt_runtime.facts_here(stage.device)
    return stage.record(
        kind=KIND,
        case=subject.card.name,
        images=1,
        reference=EAGER,
        variants=progress.figures,
        parity={name: parity.to_dict() for name, parity in progress.parity.items()},
        settings={
            "batch": 1,
            "size": list(subject.size),
            "frames": subject.frames,
            "layers": subject.card.layers,
            "weights_bytes": frozen.program.size_bytes,
            "ours_over_theirs": progress.ratios,
            "failed": progress.failed,
            "skipped": progress.skipped,
            **facts,
        },
    )


def units(stage: Stage, names: Sequence[str]) -> list[Unit]:
    """List the bases. Raises: ConfigError if one is not known."""
    found = []
    for name in names:
        if name == BOX:
            card = find_card(BOX)
            assert card is not None
            subject = Subject(card=card, size=card.native, frames=card.transition.frames)
            ways = WAYS | MORE_WAYS
            make: Callable[[], Any] = partial(open_base, BOX, device=stage.device)
        else:
            (subject,) = find_subjects([name], is_rehearsal=stage.is_rehearsal)
            ways = WAYS if stage.is_rehearsal else {few: WAYS[few] for few in FEW}
            make = partial(open_random, subject, stage, weights="fp32")
        if stage.is_rehearsal:
            ways = {name: way for name, way in ways.items() if name in IN_REHEARSAL}
        seconds = 0.0 if stage.is_rehearsal else UNIT_SECONDS
        work = partial(measure, subject, ways, make, stage)
        found.append(Unit(kind=KIND, case=subject.card.name, seconds=seconds, measure=work))
    return found


def show(outcomes: Sequence[Outcome], *, is_rehearsal: bool) -> str:
    """Make a table of what was measured, and list what was not."""
    rows, reasons = [], []
    for outcome in outcomes:
        reasons += [f"- {outcome.case}: {outcome.reason}"] if outcome.reason else []
        if outcome.record is None:
            continue
        record = outcome.record
        for name in dict.fromkeys([*record.variants, *record.parity]):
            figures = dict(record.variants.get(name, {}))
            error = record.parity.get(name, {}).get("rel_l2")
            said = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
            rows.append((record.case, name, said, "-" if error is None else f"{error:.1e}"))
        for what in ("failed", "skipped"):
            of = record.settings[what].items()
            reasons += [f"- {record.case}, {name}: {what}: {text}" for name, text in of]
    parts = [REHEARSED] if is_rehearsal else []
    parts += [table(("base", "way", "figures", "error"), rows, left=3)] if rows else []
    parts += ["\n".join(["not measured", "", *reasons])] if reasons else []
    return "\n\n".join(parts)


@click.command()
@click.option("--rehearse", "is_rehearsal", is_flag=True, help="Do what needs no TensorRT.")
@click.option("--bases", default=f"{BOX},{PAPER_BASE}", show_default=True, help="By commas.")
@click.option("--minutes", default=MINUTES, show_default=True, help="Begin nothing after these.")
@click.option("--results", type=click.Path(path_type=Path), help="[default: benchmarks/results]")
def main(is_rehearsal: bool, bases: str, minutes: float, results: Path | None) -> None:
    """Build with TensorRT, compare, time. Exit status 1 if anything failed."""
    stage = Stage(
        device="cpu" if is_rehearsal else "cuda",
        is_rehearsal=is_rehearsal,
        engine="trt",
        deadline=time.monotonic() + 60 * minutes,
    )

    def begin(folder: Path) -> Iterator[Outcome]:
        require_place(is_rehearsal=is_rehearsal)
        yield from run_units(units(stage, words(bases)), stage, folder)

    outcomes = carry_out(begin, results, is_rehearsal=is_rehearsal)
    click.echo(show(outcomes, is_rehearsal=is_rehearsal))
    if any(outcome.has_failed for outcome in outcomes):
        raise SystemExit(1)


def require_place(*, is_rehearsal: bool) -> None:
    """Require what a measurement takes.

    Raises: ConfigError if there is no GPU; EngineError if TensorRT is not there.
    """
    if is_rehearsal:
        return
    rehearsal = "Rehearse what needs neither: --rehearse, or make gpu-trt REHEARSE=1."
    if not torch.cuda.is_available():
        raise ConfigError(
            f"this measures TensorRT on a GPU, and PyTorch sees none here. {rehearsal}"
        )
    reason = trt.missing()
    if reason:
        raise EngineError(f"this measures TensorRT: {reason} {rehearsal}")


if __name__ == "__main__":
    main()
