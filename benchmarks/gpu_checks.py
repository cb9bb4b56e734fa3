"""What must hold on a GPU before anything is measured there.

Our kernels come as close to the reference as torch does; a CUDA graph gives what its kernels give;
weights change under compiled code, and back, to the last bit.
Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width, C = N D.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._inductor import metrics
from torch.nn.functional import scaled_dot_product_attention

from fewshot_rt.cards import BOX, find_card
from fewshot_rt.errors import EngineError
from fewshot_rt.export.compiled import PlanRunner
from fewshot_rt.export.live import LiveWeights, Update
from fewshot_rt.kernels import reference
from fewshot_rt.kernels.attention import attention
from fewshot_rt.kernels.normed import ACROSS_HEADS, PER_HEAD, normed_attention
from fewshot_rt.kernels.reference import Tables

from .gpu_bases import Subject
from .gpu_compiled import (
    Denoising,
    Variant,
    compile_regions,
    cut_regions,
    open_random,
    recorded,
)
from .gpu_ptx import check_ptx
from .gpu_units import Stage, Unit, require_diffusers, require_level
from .record import Record

KIND = "gpu-checks"
HALF = (torch.bfloat16, torch.float16)
# One rounding of the fp32 sums: where torch happens to round nothing (a single key), we may once.
FLOOR = 2**-24
EPSILON = 1e-6
RANK = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an operator.

    kind: of the norm in front, None without one. tables: "none", "shared" by heads or "own".
    """

    dtype: torch.dtype
    batch: int = 2
    heads: int = 3
    width: int = 64
    length: int = 129
    key_length: int = 129
    is_masked: bool = False
    kind: str | None = None
    tables: str = "none"
    skip: int = 0


def units(stage: Stage) -> list[Unit]:
    """List the checks."""
    checks: dict[str, tuple[float, Callable[[], dict[str, float]]]] = {
        "attention": (40, partial(check_operator, _attentions(), stage)),
        "normed attention": (60, partial(check_operator, _normed_attentions(), stage)),
        "graphs and weights": (60, partial(check_weights, stage)),
        "attention as PTX": (30, partial(check_ptx, stage)),
    }
    return [
        Unit(
            kind=KIND,
            case=name,
            seconds=0.0 if stage.is_rehearsal else seconds,
            measure=partial(_measure, name, check, stage),
        )
        for name, (seconds, check) in checks.items()
    ]


def _measure(name: str, check: Callable[[], dict[str, float]], stage: Stage) -> Iterator[Record]:
    yield stage.record(
        kind=KIND, case=name, images=0, reference=name, variants={name: check()}, settings={}
    )


def check_operator(cases: Sequence[Case], stage: Stage) -> dict[str, float]:
    """Require that an operator errs at most `KERNEL_RATIO` times as much as torch does.

    What it writes to is NaN before. Give the worst ratio, and how many cases there were.
    Raises: EngineError that names the first case that fails.
    """
    worst = 0.0
    for number, case in enumerate(cases):
        torch.manual_seed(number)
        ours, torchs, truth = _compute(case, stage.device)
        worst = max(worst, require_level(ours, torchs, truth, str(case), FLOOR))
    return {"worst_ratio": worst, "cases": len(cases)}


def check_weights(stage: Stage) -> dict[str, float]:
    """Require that compiled code follows its weights, and forgets an update to the last bit.

    The same of the code as a CUDA graph, which must give what its kernels give one by one.
    Raises: EngineError that says what does not hold.
    """
    require_diffusers("checks")
    card = find_card(BOX)
    assert card is not None
    subject = Subject(card=card, size=card.native, frames=card.transition.frames)
    base = open_random(subject, stage, weights="fp32")
    denoising = Denoising(base, subject, stage, batch=2)
    runner, live = _live_runner(denoising, stage)
    with torch.inference_mode():
        inputs = denoising.inputs(slice(0, 2))
        graph = recorded(runner, inputs, stage)
        before = _run(runner, inputs, graph)
        compiled = metrics.generated_kernel_count
        live.use(_updates(live))
        changed = _run(runner, inputs, graph)
        live.use({})
        after = _run(runner, inputs, graph)
    holds = {
        "an update changes the answer": not torch.equal(before, changed),
        "without the update the answer has the same bits as before": torch.equal(before, after),
        "nothing is compiled again": metrics.generated_kernel_count == compiled,
    }
    for text, is_so in holds.items():
        if not is_so:
            raise EngineError(f"it does not hold that {text}.")
    difference = float((changed - before).norm() / before.norm())
    return {"relative_change": difference, "weights": len(live.tensors)}


def _attentions() -> list[Case]:
    small = [
        {"length": 1, "key_length": 1, "batch": 1, "heads": 1},
        {"length": 37, "key_length": 19},
        {"length": 300, "key_length": 77, "is_masked": True},
        {"width": 128},
        {"width": 80, "length": 130, "key_length": 257},
    ]
    kinds = (*HALF, torch.float32)
    return [Case(dtype=dtype, **sizes) for sizes in small for dtype in kinds]  # type: ignore[arg-type]


def _normed_attentions() -> list[Case]:
    """List Wan's, LTX's and CogVideoX's ways, and Wan's to the prompt."""
    ways = [
        {"kind": ACROSS_HEADS, "tables": "shared", "width": 128},
        {"kind": ACROSS_HEADS, "tables": "own", "heads": 4},
        {"kind": PER_HEAD, "tables": "shared", "skip": 7},
        {"kind": ACROSS_HEADS, "key_length": 77, "is_masked": True},
    ]
    return [Case(dtype=dtype, **way) for way in ways for dtype in HALF]  # type: ignore[arg-type]


def _compute(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Give what our operator, torch in the same type, and the reference make of random values."""
    return _compute_attention(case, device) if case.kind is None else _compute_normed(case, device)


def _compute_attention(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (case.length, case.key_length, case.key_length)
    # Heads lie side by side in memory, as after a projection.
    values = [
        torch.randn(case.batch, length, case.heads, case.width).to(case.dtype).transpose(1, 2)
        for length in lengths
    ]
    mask = _mask(case)
    truth = reference.attention(*(value.double() for value in values), mask=mask)
    query, key, value = (value.to(device) for value in values)
    mask = None if mask is None else mask.to(device)
    with torch.no_grad(), poisoned():
        ours: Tensor = attention(query, key, value, mask)
    counts = None if mask is None else mask[:, None, None]
    torchs = scaled_dot_product_attention(query, key, value, attn_mask=counts)
    return ours, torchs, truth


def _compute_normed(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    assert case.kind is not None
    channels, is_across = case.heads * case.width, case.kind == ACROSS_HEADS
    values = [
        (torch.randn(case.batch, length, channels) + 0.5).to(case.dtype)
        for length in (case.length, case.key_length, case.key_length)
    ]
    drawn = [torch.randn(channels if is_across else case.width).to(case.dtype) for _ in range(4)]
    norms = [t if not is_across or n % 2 == 0 else None for n, t in enumerate(drawn)]
    tables, mask = _tables(case), _mask(case)
    truth = reference.attention(
        _prepared(values[0], norms[:2], tables, case),
        _prepared(values[1], norms[2:], tables, case),
        reference.split_heads(values[2].double(), case.heads),
        mask=mask,
    )

    def call(place: str) -> Tensor:
        given = [*values, *norms, *(tables or (None, None)), mask]
        moved = [None if tensor is None else tensor.to(place) for tensor in given]
        answer: Tensor = normed_attention(
            *moved, case.heads, kind=case.kind, epsilon=EPSILON, skip=case.skip
        )
        return answer

    with torch.no_grad(), poisoned():
        # On the CPU the operator is torch, with diffusers' order and roundings.
        return call(device), call("cpu"), reference.merge_heads(truth)


def _prepared(
    values: Tensor, norm: Sequence[Tensor | None], tables: Tables | None, case: Case
) -> Tensor:
    """Normalise, turn and split in fp64."""
    weight, bias = (None if part is None else part.double() for part in norm)
    assert weight is not None
    if bias is None:
        packed = reference.rms_norm(values.double(), weight, epsilon=EPSILON)
    else:
        split = reference.split_heads(values.double(), case.heads)
        packed = reference.merge_heads(reference.layer_norm(split, weight, bias, epsilon=EPSILON))
    if tables is not None and case.tables == "own":
        packed = reference.rotate(packed, tables, skip=case.skip)
    split = reference.split_heads(packed, case.heads)
    if tables is not None and case.tables == "shared":
        split = reference.rotate(split, tables, skip=case.skip)
    return split


def _tables(case: Case) -> Tables | None:
    if case.tables == "none":
        return None
    shape: tuple[int, ...] = (case.length - case.skip, case.width // 2)
    if case.tables == "own":
        shape = (case.batch, shape[0], case.heads * case.width // 2)
    angles = 10 * torch.randn(shape)
    return angles.cos(), angles.sin()


def _mask(case: Case) -> Tensor | None:
    if not case.is_masked:
        return None
    return torch.arange(case.key_length)[None] < torch.tensor([[5]] + [[60]] * (case.batch - 1))


@contextmanager
def poisoned() -> Iterator[None]:
    """Let what torch.empty gives be NaN until something writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _live_runner(denoising: Denoising, stage: Stage) -> tuple[PlanRunner, LiveWeights]:
    """Compile with our attention, on weights of its own that updates may change."""
    variant = Variant(engine=stage.engine, attention="ours")
    regions, plan, _ = cut_regions(denoising.program, variant)
    compiled = compile_regions(regions, variant, stage)
    live = LiveWeights(
        lambda name: denoising.tensors[name].clone(), plan.weights(), device=stage.device
    )
    return PlanRunner(compiled, plan, live, denoising.signature, device=stage.device), live


def _updates(live: LiveWeights) -> Mapping[str, Update]:
    """Draw an update for every matrix of the blocks."""
    matrices = {
        weight.name: tensor
        for weight, tensor in live.tensors.items()
        if ".blocks." in weight.name and tensor.dim() == 2
    }
    return {
        name: Update(torch.randn(RANK, matrix.shape[1]), torch.randn(len(matrix), RANK), 0.01)
        for name, matrix in matrices.items()
    }


def _run(runner: PlanRunner, inputs: Sequence[Tensor], graph: Callable[[], list[Tensor]]) -> Tensor:
    """Run both ways, and give what both give. Raises: EngineError if they differ in a bit."""
    direct, replayed = runner.run(inputs)[0].clone(), graph()[0].clone()
    if not torch.equal(direct, replayed):
        raise EngineError("a CUDA graph gives something else than its kernels one by one.")
    return replayed
