"""Denoisers at full size with random weights: how fast each way to run them is, and of what peak.

Axes: B batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewshot_rt.costs import TERA, Video
from fewshot_rt.errors import EngineError
from fewshot_rt.export.compiled import PlanRunner
from fewshot_rt.export.parity import KERNEL_RATIO, TOLERANCES, Parity, compare, worst

from .gpu_bases import Subject, count_pass, list_shapes
from .gpu_clock import LARGE, SMALL, measure_peaks, time_in_turns
from .gpu_compiled import COMPILERS, Denoising, Variant, open_random, recorded
from .gpu_turns import COMPILED, TIMED
from .gpu_units import Stage, Unit, attempt, free_memory, list_bases
from .record import Record
from .timing import Summary

KIND = "gpu-denoiser"
EAGER, SWAP, GRAPH, FP8 = "eager", "+ swap", "+ CUDA graph", "+ fp8"
BATCHES = (1, 4)
# Of one base: until its graph is captured and eager timed; and to compile one variant more.
BASE_SECONDS, VARIANT_SECONDS = 90.0, 60.0
TOO_LATE = f"less than {VARIANT_SECONDS:.0f} s were left to compile it"
TIMING_SECONDS = 60.0  # of all variants of one base
ROUNDS = 5  # of each variant; one takes up to a second
CHOICE_ROUNDS = 3

Run = Callable[[], Sequence[Tensor]]


@dataclass
class Progress:
    """What became of the variants of one base: what runs, and why others do not."""

    runners: dict[str, PlanRunner] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    swapped: dict[str, int] = field(default_factory=dict)
    attention: str = "torch"


def units(stage: Stage, subjects: Sequence[Subject]) -> list[Unit]:
    """List the bases.

    Raises: EngineError if diffusers is not there.
    """
    return list_bases("denoiser", KIND, subjects, stage, seconds=BASE_SECONDS, measure=measure)


def measure(subject: Subject, stage: Stage) -> Iterator[Record]:
    """Compile the variants of one base, then time them in turns; a record for each batch.

    Variants that fail, or that no minutes are left for, are named in the record.
    Raises: EngineError if eager itself gives values that are not finite.
    """
    most = max(BATCHES)
    denoising = Denoising(open_random(subject, stage), subject, stage, batch=most)
    with stage.alone():
        truths = {
            row: denoising.exact(denoising.inputs(slice(row, row + 1))) for row in (0, most - 1)
        }
    free_memory(stage)
    # What the aims are about is timed before anything else is compiled: that may take too long.
    progress = Progress()
    build_core(denoising, progress, truths)
    free_memory(stage)
    stage.wait_for_others(COMPILED, TIMING_SECONDS)
    core = list(_ways(denoising, progress))
    yield from _time_batches(subject, denoising, progress, truths, core)
    stage.wait_for_others(TIMED, VARIANT_SECONDS)
    progress.failed.clear()
    progress.skipped.clear()
    build_others(denoising, progress)
    others = [name for name in _ways(denoising, progress) if name not in core]
    if others or progress.failed or progress.skipped:
        yield from _time_batches(subject, denoising, progress, truths, [EAGER, *others])


def build_core(denoising: Denoising, progress: Progress, truths: Mapping[int, Tensor]) -> None:
    """Compile what the aims are about, as long as there is time; choose attention on the way.

    Shapes: truths [1, ...], by their row.
    """
    engine = denoising.stage.engine
    build(denoising, progress, engine, Variant(engine=engine))
    build(denoising, progress, f"{engine} {SWAP}", Variant(engine=engine, attention="ours"))
    with denoising.stage.alone():
        progress.attention = choose(denoising, progress, truths)
    chosen = Variant(engine=engine, attention=progress.attention, precision="fp8")
    build(denoising, progress, FP8, chosen)


def build_others(denoising: Denoising, progress: Progress) -> None:
    """Compile by other means, to compare, as long as there is time."""
    engine = denoising.stage.engine
    for other in COMPILERS:
        if other != engine:
            build(denoising, progress, other, Variant(engine=other))
    build(denoising, progress, f"{engine} + cuDNN", Variant(engine=engine, attention="cudnn"))


def build(denoising: Denoising, progress: Progress, name: str, variant: Variant) -> None:
    """Compile one variant, or note why it is not there."""
    if not denoising.stage.has(0.0 if denoising.stage.is_rehearsal else VARIANT_SECONDS):
        progress.skipped[name] = TOO_LATE
        return
    built, reason = attempt(lambda: denoising.build(variant))
    if built is None:
        progress.failed[name] = reason
        free_memory(denoising.stage)
        return
    progress.runners[name], sites = built
    if variant.attention == "ours":
        progress.swapped[name] = len(sites)


@torch.inference_mode()
def choose(denoising: Denoising, progress: Progress, truths: Mapping[int, Tensor]) -> str:
    """Say whose attention further variants take: of those that are right, the faster one.

    It is timed at the greatest batch. Shapes: truths [1, ...], by their row.
    """
    stage, inputs = denoising.stage, denoising.inputs(slice(0, denoising.batch))
    eager, _ = attempt(lambda: judge(partial(denoising.eager, inputs), truths))
    right: dict[str, Run] = {}
    for kind, name in (("torch", stage.engine), ("ours", f"{stage.engine} {SWAP}")):
        if name in progress.runners:
            run = partial(progress.runners[name].run, inputs)
            judged, _ = attempt(partial(judge, run, truths))
            if judged is not None and not refusal(name, judged, eager):
                right[kind] = run
    if len(right) < 2:
        return next(iter(right), "torch")
    summaries = time_in_turns(right, rounds=CHOICE_ROUNDS, device=stage.device)
    return min(summaries, key=lambda kind: summaries[kind].median_ms)


def _time_batches(
    subject: Subject,
    denoising: Denoising,
    progress: Progress,
    truths: Mapping[int, Tensor],
    names: Sequence[str],
) -> Iterator[Record]:
    """Compare and time variants with each batch, other processes kept from the GPU."""
    for batch in BATCHES:
        with denoising.stage.alone():
            record = _time(subject, denoising, progress, truths, names=names, batch=batch)
        yield record


@torch.inference_mode()
def _time(
    subject: Subject,
    denoising: Denoising,
    progress: Progress,
    truths: Mapping[int, Tensor],
    *,
    names: Sequence[str],
    batch: int,
) -> Record:
    """Compare and time variants with one batch.

    Shapes: truths [1, ...], by their row.
    """
    stage, inputs = denoising.stage, denoising.inputs(slice(0, batch))
    failed = dict(progress.failed)
    runs: dict[str, Run] = {}
    parity: dict[str, Parity] = {}
    ways = _ways(denoising, progress)
    for name in names:
        found, reason = attempt(partial(_made, partial(ways[name], inputs), truths))
        if found is not None:
            run, judged = found
            reason = refusal(name, judged, parity.get(EAGER))
            if not reason:
                runs[name], parity[name] = run, judged
        if reason:
            failed[name] = reason
    if EAGER not in runs:
        raise EngineError(f"eager fails, and nothing can be judged by it: {failed[EAGER]}")
    summaries = time_in_turns(runs, rounds=min(ROUNDS, stage.rounds), device=stage.device)
    runs.clear()
    free_memory(stage)
    video = Video(frames=subject.frames, size=subject.size)
    counted = count_pass(subject.card, video)
    return stage.record(
        kind=KIND,
        case=subject.card.name,
        images=batch,
        reference=EAGER,
        parity={name: judged.to_dict() for name, judged in parity.items()},
        settings={
            "batch": batch,
            "size": list(subject.size),
            "frames": subject.frames,
            "tokens": counted.tokens,
            "layers": subject.card.layers,
            "head_width": list_shapes(subject.card, video)[0].width,
            "weights": "bf16",
            "engine": stage.engine,
            "attention": progress.attention,
            "swapped": dict(progress.swapped),
            "failed": failed,
            "skipped": dict(progress.skipped),
        },
        **_speeds(summaries, counted.flop * batch, stage),
    )


def _speeds(summaries: Mapping[str, Summary], flop: int, stage: Stage) -> dict[str, Any]:
    """Give a record's times with what they are of the peak, and its floor."""
    peaks = measure_peaks(stage.device, SMALL if stage.is_rehearsal else LARGE)
    variants = {}
    for name, summary in summaries.items():
        speed = 1000 * flop / summary.median_ms
        shares = {"tflops": speed / TERA, "of_bf16_peak": speed / peaks["bf16"]}
        variants[name] = summary.to_dict() | shares
    floor = {f"{kind} peak, flops_per_second": peak for kind, peak in peaks.items()}
    floor |= {"flops": flop, "floor_ms": 1000 * flop / peaks["bf16"]}
    return {"variants": variants, "floor": floor}


def _made(make: Callable[[], Run], truths: Mapping[int, Tensor]) -> tuple[Run, Parity]:
    """Make a way to run, and judge it."""
    run = make()
    return run, judge(run, truths)


def _ways(denoising: Denoising, progress: Progress) -> dict[str, Callable[[Sequence[Tensor]], Run]]:
    """Give what makes each way to run: eager, compiled code as it is, and code as a CUDA graph."""
    stage, runners = denoising.stage, progress.runners
    # Each makes a call of its inputs.
    ways: dict[str, Callable[[Sequence[Tensor]], Run]] = {EAGER: partial(partial, denoising.eager)}
    for name, runner in runners.items():
        if name != FP8:
            ways[name] = partial(partial, runner.run)
    chosen = f"{stage.engine} {SWAP}" if progress.attention == "ours" else stage.engine
    if chosen in runners:
        ways[f"{chosen} {GRAPH}"] = partial(recorded, runners[chosen], stage=stage)
    if FP8 in runners:
        ways[f"{chosen} {GRAPH} {FP8}"] = partial(recorded, runners[FP8], stage=stage)
    return ways


def judge(run: Run, truths: Mapping[int, Tensor]) -> Parity:
    """Compare the rows of which the truth is known; give the worst."""
    prediction = run()[0]
    rows = [row for row in truths if row < len(prediction)]
    pairs: list[tuple[Any, Any]] = [
        (truths[row].float().cpu(), prediction[row : row + 1].float().cpu()) for row in rows
    ]
    return worst([compare({"prediction": a}, {"prediction": b}) for a, b in pairs])["prediction"]


def refusal(name: str, parity: Parity, eager: Parity | None) -> str:
    """Say why a variant is not timed: it errs too much, fp32 being the truth.

    In bf16 that is more than `KERNEL_RATIO` times as much as eager does.
    """
    limit = TOLERANCES["fp8"]
    if FP8 not in name:
        limit = KERNEL_RATIO * eager.rel_l2 if eager else float("inf")
    if parity.rel_l2 <= limit:
        return ""
    return f"it errs by {parity.rel_l2:.1e} (relative L2), and {limit:.1e} is allowed"
