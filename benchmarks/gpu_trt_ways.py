"""One denoiser in the ways of `make gpu-trt`: built, compared, adapted and timed, or rehearsed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewshot_rt.export.adapters import live_of
from fewshot_rt.export.engines import aoti, trt
from fewshot_rt.export.live import Update
from fewshot_rt.export.onnx_trt import Site, find_sites, put_plugin, read_model
from fewshot_rt.export.parity import Parity, compare, require
from fewshot_rt.export.program import Program, capture
from fewshot_rt.export.trt_choice import Measured, can_be_ours
from fewshot_rt.export.trt_declare import declare
from fewshot_rt.kernels.declaration import HAS_TRITON
from fewshot_rt.predictor import Runner
from fewshot_rt.roles import Role, make_roles, make_signatures, run_eagerly

from .gpu_bases import Subject
from .gpu_clock import time_in_turns
from .gpu_units import Stage, attempt

ROLE = "denoiser"
EAGER, COMPILED, CHOSEN = "eager fp32", "aoti bf16", "trt bf16"
OURS = f"{CHOSEN}, our attention"
ADAPTED, RESTORED = f"{CHOSEN} with an adapter", f"{CHOSEN} without it again"
RANK, SIZE = 4, 0.2  # of the adapter
REHEARSED_VERSION = (11, 4)  # of TensorRT
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to build. attention: "chosen", "theirs" or "ours"; engine: its module."""

    precision: str
    attention: str = "chosen"
    engine: Any = trt


WAYS = {
    COMPILED: Way(precision="bf16", engine=aoti),
    CHOSEN: Way(precision="bf16"),
    f"{CHOSEN}, its attention": Way(precision="bf16", attention="theirs"),
    OURS: Way(precision="bf16", attention="ours"),
}
MORE_WAYS = {f"trt {name}": Way(precision=name) for name in ("fp32", "fp16", "int8", "fp8")}
# For a base of which no more than two engines fit beside it.
FEW = (COMPILED, CHOSEN)
# One of those in bf16 is enough: before TensorRT they differ in nothing else.
IN_REHEARSAL = (OURS, *MORE_WAYS)


@dataclass(kw_only=True)
class Progress:
    """What became of the ways to run one base: what runs, how near it comes, and what failed."""

    runners: dict[str, Runner] = field(default_factory=dict)
    figures: dict[str, Figures] = field(default_factory=dict)
    parity: dict[str, Parity] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)


class Frozen:
    """The denoiser of a base for full batches of one size, in fp32, and what eager answers."""

    def __init__(self, base: Any, subject: Subject, device: str) -> None:
        height, width = subject.size
        shape = base.geometry.latent_shape(frames=subject.frames, height=height, width=width)
        prompt = {"prompt": torch.zeros(1, *subject.card.prompt, device=device)}
        signatures = make_signatures(base, prompt, latents=shape, size=subject.size, batch=1)
        self.signature, self.device = signatures[ROLE], device
        self.role: Role = make_roles(base, signatures)[ROLE]
        self.program: Program = capture(self.role, self.signature, role=ROLE)
        self.given = self.signature.example(seed=1)
        self.eager: Runner = run_eagerly(self.role, self.signature, device=torch.device(device))


def build(frozen: Frozen, name: str, way: Way, place: Path, progress: Progress) -> Figures:
    """Build, open and compare one engine; give how long it took.

    Raises: EngineError if it differs from eager by more than the precision allows.
    """
    path = place / f"{ROLE}{way.engine.suffix}"
    started = time.perf_counter()
    if way.engine is trt:
        measured = Measured(frozen.device, cache=trt.cache_beside(path, frozen.device))
        choices: dict[str, Callable[[Site], bool]] = {
            "chosen": measured,
            "theirs": lambda _: False,
            "ours": can_be_ours,
        }
        examples = (frozen.given, frozen.signature.example(seed=2))
        trt.build_with(
            choices[way.attention],
            frozen.program,
            path,
            precision=way.precision,
            examples=examples,
        )
        progress.ratios |= {str(kind): ratio for kind, ratio in measured.ratios.items()}
    else:
        way.engine.build(frozen.program, path, precision=way.precision)
    built = time.perf_counter()
    runner = way.engine.load(path, frozen.signature, device=frozen.device)
    figures = {"build_s": built - started, "load_s": time.perf_counter() - built}
    parity = judge(frozen, runner, way.precision)
    progress.runners[name], progress.parity[name] = runner, parity
    return figures


def judge(frozen: Frozen, runner: Runner, precision: str) -> Parity:
    """Compare with eager as it is now. Raises: EngineError if it comes not near enough."""
    parity = compare(frozen.eager(frozen.given), runner(frozen.given))
    require(parity, role=ROLE, tolerance=precision)
    return parity["prediction"]


def adapt(frozen: Frozen, progress: Progress) -> None:
    """Put an adapter into the live engine, compare with eager with the same one, and take it out.

    It changes all projections of attention, as adapters of the bases do at least.
    """
    if CHOSEN not in progress.runners:
        return
    runner = progress.runners[CHOSEN]

    def change() -> Figures:
        before, updates = draw_updates(frozen.role)
        started = time.perf_counter()
        live_of(runner).use(updates)
        figures = {"refit_s": time.perf_counter() - started, "weights": len(updates)}
        try:
            for name, update in updates.items():
                delta = update.scale * update.up @ update.down
                frozen.role.get_parameter(name).data += delta.to(frozen.device)
            progress.parity[ADAPTED] = judge(frozen, runner, "bf16")
        finally:
            for name, tensor in before.items():
                frozen.role.get_parameter(name).data.copy_(tensor)
        started = time.perf_counter()
        live_of(runner).use({})
        figures["back_s"] = time.perf_counter() - started
        progress.parity[RESTORED] = judge(frozen, runner, "bf16")
        return figures

    note(progress, ADAPTED, change)


def draw_updates(role: Role) -> tuple[dict[str, Tensor], dict[str, Update]]:
    """Draw an update of every projection of attention; give copies of the weights, too."""
    draw = torch.Generator().manual_seed(0)
    before, updates = {}, {}
    for name, parameter in role.named_parameters():
        if ".attn" in name and name.endswith("weight") and parameter.dim() == 2:
            rows, columns = parameter.shape
            before[name] = parameter.detach().to("cpu", copy=True)
            updates[name] = Update(
                torch.randn(RANK, columns, generator=draw) * columns**-0.5,
                torch.randn(rows, RANK, generator=draw),
                SIZE,
            )
    return before, updates


def time_all(frozen: Frozen, progress: Progress, stage: Stage) -> None:
    """Time what runs, in turns: calls from arrays to arrays, as predictors make them."""
    ways = {EAGER: frozen.eager, **progress.runners}
    calls = {name: partial(runner, frozen.given) for name, runner in ways.items()}
    summaries = time_in_turns(calls, rounds=stage.rounds, device=stage.device)
    for name, summary in summaries.items():
        progress.figures[name] = progress.figures.get(name, {}) | summary.to_dict()


def rehearse(frozen: Frozen, way: Way, folder: Path) -> Figures:
    """Do what needs neither TensorRT nor a GPU: declare a graph, and put our attention into it.

    Raises: EngineError if TensorRT would not take the graph.
    """
    started = time.perf_counter()
    declared = declare(
        frozen.program,
        folder,
        precision=way.precision,
        examples=(frozen.given,),
        version=REHEARSED_VERSION,
    )
    figures = {
        "declare_s": time.perf_counter() - started,
        "attentions": declared.attentions,
        "weights": len(declared.slots),
    }
    model = read_model(declared.path)
    sites = find_sites(model)
    if way.attention == "ours":
        figures["ours"] = put_plugin(model, lambda _: True)
        figures["kernels"] = compile_kernels(sites) if HAS_TRITON else 0
    return figures


def compile_kernels(sites: Sequence[Site]) -> int:
    """Compile our attention at these places, for every architecture; count what there is."""
    from fewshot_rt.kernels.ptx_triton import MODEST, attention_ptx, modest_launch

    found = {
        (architecture, KINDS[site.type], site.query, site.key[2])
        for site in sites
        for architecture in MODEST
        if modest_launch(architecture, site.query[3]) is not None
    }
    for architecture, kind, (batch, heads, length, width), key_length in sorted(found):
        shape = batch, heads, length, width
        attention_ptx(architecture, kind, shape=shape, key_length=key_length, is_packed=True)
    return len(found)


def note(progress: Progress, name: str, work: Callable[[], Figures]) -> None:
    """Do one part; note its figures, or why there are none."""
    figures, failure = attempt(work)
    if figures is None:
        progress.failed[name] = failure
    else:
        progress.figures[name] = figures
