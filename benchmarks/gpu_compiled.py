"""One denoiser at its full size, with random weights: eager, and captured and compiled in variants.

All variants read the same weights, in the type in which the base has them: a second copy of 14
billion would not fit. Graphs are captured in that type, too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewshot_rt.cards import open_empty
from fewshot_rt.costs import list_blocks
from fewshot_rt.export.compiled import Compiled, PlanRunner, quiet, trace
from fewshot_rt.export.cuda_graphs import CudaGraph
from fewshot_rt.export.engines import aoti, inductor
from fewshot_rt.export.forms import PLAIN, derive
from fewshot_rt.export.lifted import lift
from fewshot_rt.export.live import LiveWeights
from fewshot_rt.export.lower import lower
from fewshot_rt.export.program import Program, capture
from fewshot_rt.export.regions import Plan, cut
from fewshot_rt.kernels.swap import Site, swap_attention
from fewshot_rt.roles import make_roles, make_signatures

from .gpu_bases import Subject
from .gpu_units import Stage

ROLE = "denoiser"
# Which of torch's kernels for attention comes first, where cuDNN's is to be preferred.
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# Regions ready to compile, how they are called, and the attentions that were swapped in them.
Cut = tuple[dict[str, ExportedProgram], Plan, tuple[Site, ...]]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compile. attention: "torch", "ours" or "cudnn"; precision: as engines have it."""

    engine: str
    attention: str = "torch"
    precision: str = "bf16"


def open_random(subject: Subject, stage: Stage, *, weights: str = "bf16") -> Any:
    """Open a base with random weights, made where they are used. weights: "fp32" or "bf16"."""
    torch.manual_seed(0)
    with torch.device(stage.device):
        return open_empty(subject.card, weights=weights)


class Denoising:
    """The denoiser of a base on videos of one shape. batch: the greatest that is asked for."""

    def __init__(self, base: Any, subject: Subject, stage: Stage, *, batch: int) -> None:
        self.base, self.stage, self.batch = base, stage, batch
        self._cuts: dict[tuple[bool, str], Cut] = {}
        self._compiled: dict[str, Compiled] = {}
        height, width = subject.size
        geometry = self.base.geometry
        self.latent_shape = geometry.latent_shape(frames=subject.frames, height=height, width=width)
        prompt = {"prompt": torch.zeros(1, *subject.card.prompt, device=stage.device)}
        # The batch axis varies even where only batches of one are asked for.
        signatures = make_signatures(
            self.base,
            prompt,
            latents=self.latent_shape,
            size=subject.size,
            batch=max(2, batch),
        )
        self.signature = signatures[ROLE]
        role = make_roles(self.base, signatures)[ROLE]
        with quiet():
            self.program = capture(role, self.signature, role=ROLE)
        self.tensors = _tensors_of(self.program, stage.device)
        example = self.signature.example(seed=1, batch=batch)
        self._inputs = [
            torch.from_numpy(example[spec.name]).to(stage.device) for spec in self.signature.inputs
        ]

    def inputs(self, rows: slice) -> list[Tensor]:
        """Give some rows of the inputs, in the order of the signature."""
        return [
            tensor[rows] if isinstance(spec.axes[0], str) else tensor
            for spec, tensor in zip(self.signature.inputs, self._inputs, strict=True)
        ]

    def eager(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Predict as the base does. Shapes: as the signature says."""
        names = (spec.name for spec in self.signature.inputs)
        return [self.base.denoiser()(**dict(zip(names, inputs, strict=True)))]

    @torch.no_grad()
    def exact(self, inputs: Sequence[Tensor]) -> Tensor:
        """Predict in fp32, what bf16 is judged by; one block at a time is widened for it."""
        with _widened(self.base):
            return self.eager(inputs)[0]

    def build(self, variant: Variant) -> tuple[PlanRunner, tuple[Site, ...]]:
        """Compile a variant, each kind of block once, on the weights of the base.

        The attentions that were swapped in it are given, too.

        Raises: whatever capture, passes and compilers raise.
        """
        captured = variant.attention == "ours", variant.precision
        if captured not in self._cuts:
            self._cuts[captured] = cut_regions(self.program, variant)
        regions, plan, sites = self._cuts[captured]
        with attention_order(variant):
            compiled = compile_regions(regions, variant, self.stage, self._compiled)
        live = LiveWeights(self._unread, ())
        for weight in plan.weights():
            source = self.tensors[weight.name]
            plain = weight.form == PLAIN
            live.tensors[weight] = source if plain else derive(source, weight.form).contiguous()
        return PlanRunner(compiled, plan, live, self.signature, device=self.stage.device), sites

    def _unread(self, name: str) -> Tensor:
        raise AssertionError(f"{name} is read although all weights are given")


def cut_regions(program: Program, variant: Variant) -> Cut:
    """Give the regions of a variant ready to compile, as `export.compiled.prepare` does."""
    lifted = lift(program)
    sites = swap_attention(lifted.module) if variant.attention == "ours" else ()
    lower(lifted, variant.precision)
    graphs, plan = cut(lifted)
    most = program.signature.most
    with quiet():
        regions = {name: trace(graph, most=most) for name, graph in graphs.items()}
    return regions, plan, sites


def compile_regions(
    regions: Mapping[str, ExportedProgram],
    variant: Variant,
    stage: Stage,
    compiled: dict[str, Compiled] | None = None,
) -> dict[str, Compiled]:
    """Compile regions; a rehearsal runs them as they are, since compiling takes minutes.

    compiled: what other variants have, to which this one's are added; what surrounds the blocks is
    often the same.
    """
    compiler = run_directly if stage.is_rehearsal else COMPILERS[variant.engine]
    known = {} if compiled is None else compiled
    keys = {name: _describe(region, variant) for name, region in regions.items()}
    with quiet():
        for name, region in regions.items():
            if keys[name] not in known:
                known[keys[name]] = compiler(region)
    return {name: known[key] for name, key in keys.items()}


def _describe(region: ExportedProgram, variant: Variant) -> str:
    """Give all that the code of a region follows from; its weights come from outside."""
    assert not region.state_dict
    assert not region.constants
    code = region.graph_module.code
    given = [node.meta.get("val") for node in region.graph.nodes if node.op == "placeholder"]
    shapes = [
        f"{value.dtype} {value.shape} {value.stride()}" if isinstance(value, Tensor) else str(value)
        for value in given
    ]
    # Which of torch's kernels comes first only matters where it attends.
    attention = variant.attention if "scaled_dot_product" in code else ""
    return "\n".join([variant.engine, attention, code, *shapes])


def compile_with_aoti(region: ExportedProgram) -> Compiled:
    """Compile a region as engine `aoti` does."""
    devices = {node.meta["val"].device for node in region.graph.find_nodes(op="placeholder")}
    (device,) = {device.type for device in devices}
    return aoti.open_region(aoti.compile_region(region), Path("region"), device=device)


def run_directly(region: ExportedProgram) -> Compiled:
    """Let a region run without a compiler."""
    module: Compiled = region.module()
    return module


COMPILERS: dict[str, Callable[[ExportedProgram], Compiled]] = {
    "inductor": inductor.compile_region,
    "aoti": compile_with_aoti,
}


def attention_order(variant: Variant) -> AbstractContextManager[Any]:
    """Let torch prefer cuDNN's attention while a variant is compiled that asks for it."""
    if variant.attention != "cudnn":
        return nullcontext()
    order: AbstractContextManager[Any] = sdpa_kernel(CUDNN_FIRST, set_priority=True)
    return order


def recorded(runner: PlanRunner, inputs: Sequence[Tensor], stage: Stage) -> Callable[[], Any]:
    """Give a function that runs on these inputs, on a GPU as one graph."""
    if stage.device != "cuda":
        return lambda: runner.run(inputs)
    graph = CudaGraph(runner.run, inputs)
    return lambda: graph(inputs)


def _tensors_of(program: Program, device: str) -> dict[str, Tensor]:
    """Give what a program holds by name, where it runs."""
    weights, constants = program.exported.state_dict, program.exported.constants
    return {name: tensor.detach().to(device) for name, tensor in {**weights, **constants}.items()}


@contextmanager
def _widened(base: Any) -> Iterator[None]:
    """Keep the weights of a denoiser in fp32, those of a block only while it runs."""
    denoiser = base.denoiser()
    kept: dict[Any, Tensor] = {}

    def widen(parameters: Sequence[Any]) -> None:
        for parameter in parameters:
            kept[parameter], parameter.data = parameter.data, parameter.data.float()

    def restore(parameters: Sequence[Any]) -> None:
        for parameter in parameters:
            parameter.data = kept.pop(parameter)

    hooks, in_blocks = [], set()
    for block in list_blocks(base):
        inside = list(block.parameters())
        in_blocks.update(inside)
        hooks.append(block.register_forward_pre_hook(lambda *_, inside=inside: widen(inside)))
        hooks.append(block.register_forward_hook(lambda *_, inside=inside: restore(inside)))
    kind, denoiser.dtype = denoiser.dtype, torch.float32
    widen([parameter for parameter in denoiser.parameters() if parameter not in in_blocks])
    try:
        yield
    finally:
        restore(list(kept))
        denoiser.dtype = kind
        for hook in hooks:
            hook.remove()
