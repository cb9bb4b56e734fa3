"""Measure ways to answer the same images with the same adapter, in one interleaved run.

Axes: B batch, H W pixels.
"""

import time
from collections.abc import Callable, Mapping

from fewshot_rt.errors import ConfigError, unknown
from fewshot_rt.export.parity import Parity, compare, require
from fewshot_rt.predictor import Floats

from .floor import Floor
from .plain import Answer
from .record import Record
from .timing import interleave, summarise
from .ways import Apart

# Calls before each that is timed: a folder is answered in a row, and the first calls after others'
# meet caches without their weights, and a processor that has slept.
LEAD = 3


def bench_predict(
    variants: Mapping[str, Answer],
    images: Floats,
    *,
    case: str,
    floor: Floor,
    reference: str = "eager",
    precisions: Mapping[str, str] | None = None,
    rounds: int = 20,
    warmup: int = 2,
) -> Record:
    """Measure variants that answer one batch of images; without parity, no number.

    variants: by name, usually "plain" (see `plain_loop`), "eager" (`Predictor.answer` of the merged
    base) and one for each bundle. floor: see `find_floor`. precisions: of variants that are not in
    fp32, by name.

    Shapes: images [B, 3, H, W], at most one batch of the predictors.
    Raises: EngineError if an answer differs from the reference by more than its precision allows;
    ConfigError if the reference is not among the variants.
    """
    if reference not in variants:
        raise ConfigError(unknown("variant", reference, variants))
    answers, first_ms = _first_calls(variants, images)
    parity = {
        name: _gate(name, answers[reference], answer, (precisions or {}).get(name, "fp32"))
        for name, answer in answers.items()
        if name != reference
    }
    calls = {name: _call(answer, images) for name, answer in variants.items()}
    samples = interleave(calls, rounds=rounds, warmup=warmup, lead=LEAD)
    return Record(
        case=case,
        images=len(images),
        reference=reference,
        variants={
            name: {**summarise(times).to_dict(), "first_ms": first_ms[name]}
            for name, times in samples.items()
        },
        parity={name: value.to_dict() for name, value in parity.items()},
        floor=floor.to_dict(),
        settings={
            "rounds": rounds,
            "warmup": warmup,
            "lead": LEAD,
            "size": list(images.shape[2:]),
        },
    )


def _first_calls(
    variants: Mapping[str, Answer], images: Floats
) -> tuple[dict[str, Floats], dict[str, float]]:
    """Call each variant once; give the answers and the times in ms."""
    answers, times = {}, {}
    for name, answer in variants.items():
        started = time.perf_counter()
        answers[name] = answer(images)
        times[name] = 1000 * (time.perf_counter() - started)
    return answers, times


def _gate(name: str, reference: Floats, answer: Floats, precision: str) -> Parity:
    parities = compare({"image": reference}, {"image": answer})
    require(parities, role=name, tolerance=precision)
    return parities["image"]


def _call(answer: Answer, images: Floats) -> Callable[[], object]:
    """Give a call that is timed; one in another process keeps its answers there."""
    return answer.again if isinstance(answer, Apart) else lambda: answer(images)
