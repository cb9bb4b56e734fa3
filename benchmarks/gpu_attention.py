"""Our attention against torch's own, at the sizes that the bases have.

Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from fewshot_rt.costs import TERA, Video
from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.export.parity import KERNEL_RATIO, Parity, compare
from fewshot_rt.kernels import reference
from fewshot_rt.kernels.attention import attention

from .gpu_bases import PAPER_BASE, Shape, Subject, list_shapes
from .gpu_checks import FLOOR
from .gpu_clock import repeated, time_in_turns
from .gpu_units import Stage, Unit, attempt, require_diffusers
from .record import Record
from .timing import Summary

KIND = "gpu-attention"
OURS, DEFAULT, CUDNN = "ours", "torch's choice", "cuDNN"
FRAMES = (9, 49, 5)  # in the order of what they matter
SECONDS = 15.0  # that one size takes at most, most of them for compiling flex attention
# Calls that are timed together do about so much arithmetic, so that starting them does not count.
TIMED_FLOP, MOST_CALLS = 2e12, 200
# Queries at the end whose answers are compared: the reference of all would take too much memory.
COMPARED = 256

Values = tuple[Tensor, Tensor, Tensor]
Call = Callable[[], Tensor]


def units(stage: Stage, subjects: Sequence[Subject]) -> list[Unit]:
    """List the sizes of all bases, each once; what an answer takes first, then longer videos.

    Raises: EngineError if diffusers is not there.
    """
    require_diffusers("attention")
    found: dict[Shape, list[str]] = {}
    for subject, video in _videos(subjects):
        for shape in _shapes(subject, video):
            names = found.setdefault(shape, [])
            names += [subject.card.name] if subject.card.name not in names else []
    return [
        Unit(
            kind=KIND,
            case=f"attention, {shape}",
            seconds=0.0 if stage.is_rehearsal else SECONDS,
            measure=partial(measure, shape, names, stage),
        )
        for shape, names in found.items()
    ]


@torch.no_grad()
def measure(shape: Shape, bases: Sequence[str], stage: Stage) -> Iterator[Record]:
    """Compare and time all ways to attend at one size, batch 1, bf16.

    bases: that have this size.
    Raises: EngineError if torch's own choice fails, by which the others are judged.
    """
    values = draw(shape, stage.device)
    calls, case = list_calls(values, stage), f"attention, {shape}"
    yield time_calls(KIND, case, shape, values, calls, stage, {"bases": list(bases)})


def draw(shape: Shape, device: str) -> Values:
    """Draw queries, keys and values in bf16, batch 1. Shapes: [1, N, L, D], [1, N, K, D] twice."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(
            1, length, shape.heads, shape.width, dtype=torch.bfloat16, device=device
        ).transpose(1, 2)
        for length in (shape.length, shape.key_length, shape.key_length)
    )
    return query, key, value


def time_calls(
    kind: str,
    case: str,
    shape: Shape,
    values: Values,
    calls: Mapping[str, Call],
    stage: Stage,
    settings: Mapping[str, Any],
) -> Record:
    """Compare ways to attend with the truth, then time them in turns.

    Raises: EngineError if torch's own choice fails, by which the others are judged.
    """
    place = stage.device
    count = min(MOST_CALLS, math.ceil(TIMED_FLOP / shape.flop)) if place == "cuda" else 1
    parity: dict[str, Parity] = {}
    failed: dict[str, str] = {}
    timed: dict[str, Callable[[], Any]] = {}
    with stage.alone():
        truth = _truth(*values)
        for name, call in calls.items():
            found, reason = attempt(
                partial(_prepare, call, truth, parity.get(DEFAULT), count, place)
            )
            if found is None:
                failed[name] = reason
            else:
                timed[name], parity[name] = found
        if DEFAULT not in timed:
            raise EngineError(f"torch's own attention failed: {failed[DEFAULT]}")
        summaries = time_in_turns(timed, rounds=stage.rounds, device=place)
    return stage.record(
        kind=kind,
        case=case,
        images=1,
        reference=DEFAULT,
        variants={name: _speed(summary, shape, count) for name, summary in summaries.items()},
        parity={name: judged.to_dict() for name, judged in parity.items()},
        floor={"flops": shape.flop},
        settings={**vars(shape), **settings, "failed": failed, "calls a timing": count},
    )


def _speed(summary: Summary, shape: Shape, count: int) -> dict[str, float]:
    """Give the times of one call of the `count` that were timed together, and TFLOP/s."""
    times = {name: value / count for name, value in summary.to_dict().items() if name != "count"}
    speed = 1000 * shape.flop / times["median_ms"]
    return times | {"count": summary.count, "tflops": speed / TERA}


def _videos(subjects: Sequence[Subject]) -> Iterator[tuple[Subject, Video]]:
    """List the videos of all bases; of the paper's at its native size, too, to its full length."""
    for frames in FRAMES:
        for subject in subjects:
            yield subject, Video(frames=frames, size=subject.size)
    for subject in subjects:
        card = subject.card
        if card.name == PAPER_BASE and subject.size != card.native:
            for frames in (*FRAMES, card.transformer["sample_frames"]):
                yield subject, Video(frames=frames, size=card.native)


def _shapes(subject: Subject, video: Video) -> tuple[Shape, ...]:
    """List the attentions of a base; none where it does not take such a video.

    Attention to the prompt is as long at any other number of frames; it is listed once.
    """
    try:
        shapes = list_shapes(subject.card, video)
    except ModelError:
        return ()
    is_first = video.frames == FRAMES[0]
    return tuple(s for s in shapes if is_first or s.length == s.key_length)


def list_calls(values: Values, stage: Stage) -> dict[str, Call]:
    """Give all ways to attend; a rehearsal runs those that a CPU lacks by other means."""
    torch._dynamo.reset()  # one size, one compilation of flex attention
    compiler = "eager" if stage.is_rehearsal else "inductor"
    flexible: Any = torch.compile(flex_attention, dynamic=False, backend=compiler)

    def torchs(backend: SDPBackend) -> Tensor:
        backend = SDPBackend.MATH if stage.is_rehearsal else backend
        chosen: AbstractContextManager[Any] = sdpa_kernel(backend)
        with chosen:
            return scaled_dot_product_attention(*values)

    return {
        DEFAULT: lambda: scaled_dot_product_attention(*values),
        OURS: lambda: attention(*values),
        CUDNN: lambda: torchs(SDPBackend.CUDNN_ATTENTION),
        "flash": lambda: torchs(SDPBackend.FLASH_ATTENTION),
        "flex": lambda: flexible(*values),
    }


def _truth(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Give what the first and the last head answer to the last queries, in fp32."""
    heads = [0, -1]
    last = query[:, heads, -COMPARED:]
    return reference.attention(last, key[:, heads], value[:, heads])


def _prepare(
    call: Call, truth: Tensor, default: Parity | None, count: int, device: str
) -> tuple[Callable[[], Any], Parity]:
    """Compare a way with the truth; make `count` calls of it one.

    What the truth does not cover must at least be finite. default: how torch's own choice compares.
    Raises: EngineError if it errs more than `KERNEL_RATIO` times as much.
    """
    answer = call()
    if not bool(answer.isfinite().all()):
        raise EngineError("it gives values that are not finite.")
    part = answer[:, [0, -1], -COMPARED:].float()
    parity = compare({"answer": truth.cpu()}, {"answer": part.cpu()})["answer"]
    limit = FLOOR + KERNEL_RATIO * (default or parity).rel_l2
    if not parity.rel_l2 <= limit:
        raise EngineError(f"it errs by {parity.rel_l2:.1e}, and {limit:.1e} is allowed")
    return repeated(call, count, device=device), parity
