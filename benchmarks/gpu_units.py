"""What `make gpu` is made of: units that end in records, a limit of minutes, and failures kept.

A unit that fails or no longer fits into the minutes does not keep the others from being measured.
"""

import gc
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import click
import torch
from torch import Tensor

from fewshot_rt.errors import ConfigError, EngineError, FewshotError
from fewshot_rt.export.parity import KERNEL_RATIO

from .gpu_bases import Subject
from .record import RESULTS, Record, append_record

if TYPE_CHECKING:
    from .gpu_turns import Turns

T = TypeVar("T")
LONGEST_REASON = 500  # letters of an error's text that a record keeps
PATH = re.compile(r"(?<![\w.])/[^\s:,'\"]+")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where and how all of it runs.

    device: "cuda", or "cpu" in a rehearsal, whose figures say nothing. engine: what compiles the
    variants that build on each other. deadline: when to begin nothing more, by `time.monotonic`.
    turns: with what other processes the GPU is shared, if it is.
    """

    device: str
    is_rehearsal: bool
    engine: str
    deadline: float
    turns: "Turns | None" = None

    @property
    def rounds(self) -> int:
        """How often each variant is timed."""
        return 2 if self.is_rehearsal else 10

    def has(self, seconds: float) -> bool:
        """Say whether so much time is left."""
        return self.deadline - time.monotonic() >= seconds

    def alone(self) -> AbstractContextManager[None]:
        """Keep other processes of `make gpu` from the GPU for a while."""
        return self.turns.alone() if self.turns else nullcontext()

    def wait_for_others(self, phase: str, seconds: float) -> None:
        """Wait for other processes' phase to be done, as long as so much time is left after it."""
        if self.turns:
            self.turns.wait_for_others(phase, self.deadline - seconds)

    def record(self, *, settings: Mapping[str, Any], **fields: Any) -> Record:
        """Make a record that also says what else decides its figures."""
        facts: dict[str, Any] = {"rehearsal": self.is_rehearsal, "device": self.device}
        facts |= {"triton": _version("triton"), "cudnn": _cudnn()}
        return Record(settings=facts | dict(settings), **fields)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is measured as one, and gives a record as soon as a part of it is done.

    seconds: it is not begun with less time left.
    """

    kind: str
    case: str
    seconds: float
    measure: Callable[[], Iterator[Record]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a unit, so far: a record, or why there is none.

    has_failed: whether it, or a part of it, failed; what is only skipped has not.
    """

    case: str
    record: Record | None
    reason: str = ""
    has_failed: bool = False


def run_units(units: Sequence[Unit], stage: Stage, results: Path) -> Iterator[Outcome]:
    """Measure units in turn; write each record as soon as there is one, and yield what came of it.

    Raises: DataError if the results cannot be written.
    """
    for unit in units:
        if not stage.has(unit.seconds):
            reason = f"skipped: less than the {unit.seconds:.0f} s that it may take are left"
            yield Outcome(case=unit.case, record=None, reason=reason)
            continue
        parts = unit.measure()
        while True:
            record, reason = attempt(partial(next, parts, None))
            if record is None:
                break
            append_record(record, results)
            has_failed = bool(record.settings.get("failed"))
            yield Outcome(case=unit.case, record=record, has_failed=has_failed)
        if reason:
            append_record(_failure(unit, stage, reason), results)
            yield Outcome(case=unit.case, record=None, reason=reason, has_failed=True)
        free_memory(stage)


def carry_out(
    begin: Callable[[Path], Iterator[Outcome]], results: Path | None, *, is_rehearsal: bool
) -> list[Outcome]:
    """Begin measurements, which write their records into a folder, and say what came of each.

    results: that folder. None is the one of all records; those of a rehearsal are let go.
    Raises: ClickException if something cannot be begun, or a rehearsal's records would lie among
    the others.
    """
    outcomes = []
    with TemporaryDirectory() as kept:
        try:
            if is_rehearsal and results is not None and results.resolve() == RESULTS.resolve():
                raise ConfigError("what a rehearsal gives is no measurement. Give other --results.")
            for outcome in begin(results or (Path(kept) if is_rehearsal else RESULTS)):
                outcomes.append(outcome)
                click.echo(f"{outcome.case}: {outcome.reason or 'done'}", err=True)
        except FewshotError as error:
            raise click.ClickException(str(error)) from error
    return outcomes


def require_level(ours: Tensor, torchs: Tensor, truth: Tensor, what: str, floor: float) -> float:
    """Require that we err at most `KERNEL_RATIO` times as much as torch in the same type does.

    truth: on the CPU in fp64. floor: a relative error that is allowed in any case.
    Give the ratio of the errors.
    Raises: EngineError that names `what`.
    """
    size = float(truth.norm())
    errors = [float((found.cpu().double() - truth).norm()) / size for found in (ours, torchs)]
    ratio = errors[0] / (errors[1] + floor / KERNEL_RATIO)
    # Written so that NaN fails.
    if not ratio <= KERNEL_RATIO:
        raise EngineError(
            f"{what} errs by {errors[0]:.1e}, torch in the same type by {errors[1]:.1e}; "
            f"{KERNEL_RATIO:g} times that is allowed."
        )
    return ratio


def words(text: str) -> list[str]:
    """Read a list, by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """Do a part of a measurement; give what came of it, or None and the error's text."""
    try:
        return work(), ""
    # A part's border: compilers and GPUs raise errors of all classes, and the rest shall go on.
    except Exception as error:  # noqa: BLE001
        click.echo(traceback.format_exc(), err=True)
        # On one line, and without the paths of this machine.
        text = PATH.sub("...", " ".join(str(error).split())) or "no text"
        return None, f"{type(error).__name__}: {text[:LONGEST_REASON]}"


def free_memory(stage: Stage) -> None:
    """Give the GPU back what nothing holds any more."""
    gc.collect()
    if stage.device == "cuda":
        torch.cuda.empty_cache()


def list_bases(
    section: str,
    kind: str,
    subjects: Sequence[Subject],
    stage: Stage,
    *,
    seconds: float,
    measure: Callable[[Subject, Stage], Iterator[Record]],
) -> list[Unit]:
    """Make a unit of each base. seconds: that one takes at least; a rehearsal begins all.

    Raises: EngineError if diffusers is not there.
    """
    require_diffusers(section)
    return [
        Unit(
            kind=kind,
            case=subject.card.name,
            seconds=0.0 if stage.is_rehearsal else seconds,
            measure=partial(measure, subject, stage),
        )
        for subject in subjects
    ]


def require_diffusers(section: str) -> None:
    """Require the package whose networks a section measures.

    Raises: EngineError if it is not there.
    """
    if find_spec("diffusers") is None:
        raise EngineError(
            f"section {section!r} needs the package 'diffusers', which is not installed. Install "
            "it, or unpack its wheel somewhere and put that folder on PYTHONPATH."
        )


def _failure(unit: Unit, stage: Stage, reason: str) -> Record:
    settings = {"failed": {unit.case: reason}}
    return stage.record(
        kind=unit.kind, case=unit.case, images=0, reference="", variants={}, settings=settings
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cudnn() -> int | None:
    found: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return found
