"""One command that checks, then measures on a GPU, prints short tables last, and keeps records.

`make gpu`, or `python -m fewshot_rt.benchmarks.gpu`. Sections: checks; attention at the sizes of
all bases; denoisers at full size with random weights; answers from file to file; and if it is asked
for, `launches`, the configurations of our attention. Without a GPU `--rehearse` runs all of it to
the last line on the CPU, at tiny sizes; its figures say nothing, and are kept nowhere.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import torch

from fewshot_rt.cards import BOX, read_cards
from fewshot_rt.errors import ConfigError, unknown

from . import gpu_answer, gpu_attention, gpu_checks, gpu_denoiser, gpu_launches
from .gpu_bases import MEASURED, Subject, find_subjects
from .gpu_compiled import COMPILERS
from .gpu_table import show
from .gpu_turns import Share, Turns, run_shares
from .gpu_units import Outcome, Stage, Unit, attempt, carry_out, run_units, words

SECTIONS: dict[str, Callable[[Stage, Sequence[Subject]], list[Unit]]] = {
    "checks": lambda stage, _: gpu_checks.units(stage),
    "attention": gpu_attention.units,
    "denoiser": gpu_denoiser.units,
    "answer": gpu_answer.units,
    "launches": gpu_launches.units,
}
USUAL = ("checks", "attention", "denoiser", "answer")
ENGINE = "inductor"  # it compiles sooner than AOTInductor, which waits for a C++ compiler
MINUTES = 9.0  # less than the ten that a command often has on a GPU that is lent


def run(
    sections: Sequence[str], stage: Stage, results: Path, *, bases: Sequence[str] = ()
) -> Iterator[Outcome]:
    """Run sections in turn, and yield what came of each part.

    bases: by name; if none is named, all known ones for attention, and `MEASURED` for the others; a
    rehearsal takes the paper's alone.
    Raises: ConfigError if a base is not known; DataError if the results cannot be written.
    """
    known = [card.name for card in read_cards() if card.name != BOX]
    ordered = (*MEASURED, *(name for name in known if name not in MEASURED))
    for section in sections:
        usual = ordered if section == "attention" else MEASURED
        names = bases or (usual[:1] if stage.is_rehearsal else usual)
        subjects = find_subjects(names, is_rehearsal=stage.is_rehearsal)
        found, reason = attempt(partial(SECTIONS[section], stage, subjects))
        if found is None:
            yield Outcome(case=section, record=None, reason=reason, has_failed=True)
            continue
        yield from run_units(found, stage, results)


@click.command()
@click.option("--rehearse", is_flag=True, help="Run on the CPU at tiny sizes; figures stay open.")
@click.option("--only", default=",".join(USUAL), show_default=True, help="Sections, by commas.")
@click.option("--bases", default="", help="Bases by name, by commas.  [default: the known ones]")
@click.option("--minutes", default=MINUTES, show_default=True, help="Begin nothing after these.")
@click.option("--engine", type=click.Choice(list(COMPILERS)), default=ENGINE, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), help="[default: benchmarks/results]")
@click.option("--at-once", is_flag=True, help="Compile side by side; it takes all memory at once.")
@click.option("--share", default="", hidden=True)  # a process of --at-once
def main(
    rehearse: bool,
    only: str,
    bases: str,
    minutes: float,
    engine: str,
    results: Path | None,
    at_once: bool,
    share: str,
) -> None:
    """Check, then measure on a GPU. Exit status 1 if anything failed; what was skipped has not."""
    turns = Turns(**json.loads(share)) if share else None
    stage = Stage(
        device="cpu" if rehearse else "cuda",
        is_rehearsal=rehearse,
        engine=engine,
        deadline=time.monotonic() + 60 * minutes,
        turns=turns,
    )

    def begin(folder: Path) -> Iterator[Outcome]:
        sections = _sections(only)
        _require_gpu(is_rehearsal=rehearse)
        if not at_once:
            yield from run(sections, stage, folder, bases=words(bases))
            return
        options = ["--minutes", str(minutes), "--engine", engine, "--results", str(folder)]
        options += ["--rehearse"] if rehearse else []
        named = words(bases) or (MEASURED[:1] if rehearse else MEASURED)
        yield from run_shares(list(_shares(sections, named)), options)

    outcomes = carry_out(begin, results, is_rehearsal=rehearse)
    if turns:
        turns.report(outcomes)
    click.echo(show(outcomes, is_rehearsal=rehearse))
    if any(outcome.has_failed for outcome in outcomes):
        raise SystemExit(1)


def _shares(sections: Sequence[str], bases: Sequence[str]) -> Iterator[Share]:
    """Give each section a process, and each base's denoiser: those compile the longest."""
    for section in sections:
        if section != "denoiser":
            options = ["--only", section, "--bases", ",".join(bases)]
            yield Share(name=section, options=options, is_waited=section == "checks")
            continue
        for base in dict.fromkeys(bases):
            name = f"{section} {base.replace('/', ' ')}"
            options = ["--only", section, "--bases", base]
            yield Share(name=name, options=options, is_waited=True)


def _sections(only: str) -> list[str]:
    """Read the names of sections. Raises: ConfigError if one is not known."""
    names = words(only)
    for name in names:
        if name not in SECTIONS:
            raise ConfigError(unknown("section", name, SECTIONS))
    return names


def _require_gpu(*, is_rehearsal: bool) -> None:
    """Raises: ConfigError if there is no GPU to measure."""
    if not is_rehearsal and not torch.cuda.is_available():
        raise ConfigError(
            "this measures a GPU, and PyTorch sees none here. Rehearse it on the CPU: --rehearse, "
            "or make gpu REHEARSE=1."
        )


if __name__ == "__main__":
    main()
