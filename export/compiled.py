"""What the engines `inductor` and `aoti` share: regions to compile, files of them, and a runner.

A role is an archive of regions, and beside it the weights with the plan that calls the regions.
"""

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from fewshot_rt.device import has_fast_bf16
from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.kernels.swap import Site, swap_attention
from fewshot_rt.spec import Signature

from .choice import Measured
from .cuda_graphs import Recorded, Run, run_on_arrays
from .engine import AGAIN, make_runner, require_device, require_same
from .lifted import Lifted, Weight, lift
from .live import LiveWeights, compact
from .lower import lower
from .regions import Plan, Value, cut

if TYPE_CHECKING:
    from .program import Program

Compiled = Callable[..., Sequence[Tensor]]
WEIGHTS_SUFFIX = ".safetensors"
HALF = torch.bfloat16  # what attention computes in unless it is in fp32
FP8_CAPABILITY = (8, 9)


class PlanRunner:
    """Runs compiled regions as a plan says, on weights that may change between calls.

    On a GPU all launches of a call are recorded and started as one, see `CudaGraph`.
    """

    def __init__(
        self,
        regions: Mapping[str, Compiled],
        plan: Plan,
        live: LiveWeights,
        signature: Signature,
        *,
        device: str,
    ) -> None:
        self.live, self.device = live, device
        self._regions, self._plan, self._spent = regions, plan, plan.spent()
        is_on_gpu = torch.device(device).type == "cuda"
        self._start: Run = Recorded(self.run) if is_on_gpu else self.run
        self._runner = make_runner(
            signature, lambda arrays: run_on_arrays(self._start, arrays, self.device)
        )

    def __call__(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Take and give arrays by name, as the signature has them."""
        return self._runner(tensors)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Call the regions in turn. Shapes: as the signature of the role says."""
        values: dict[int, Tensor] = {}

        def get(value: Value) -> Tensor:
            if value.kind == "weight":
                return self.live.tensors[Weight(value.name, value.form)]
            return inputs[int(value.name)] if value.kind == "input" else values[int(value.name)]

        for call, spent in zip(self._plan.calls, self._spent, strict=True):
            results = self._regions[call.region](*(get(value) for value in call.takes))
            values |= zip(call.gives, results, strict=True)
            for number in spent:
                del values[number]
        return [get(value) for value in self._plan.outputs]


def prepare(
    program: "Program",
    *,
    precision: str,
    whole: bool = False,
    ours: Callable[[Site], bool] | None = None,
    normed: bool = False,
) -> tuple[dict[str, ExportedProgram], Plan, Lifted]:
    """Give the regions of a program in a precision, ready to compile, and their plan.

    whole: one region for all, instead of one for each kind of block. ours, normed: which attentions
    our kernels take over, see `swap_attention`; None leaves it to what is measured on the GPU, and
    to torch on a processor.

    Raises: EngineError if an attention is of a kind that no kernel of ours has.
    """
    lifted = lift(program)
    if ours is None and program.device == "cuda":
        ours = Measured(program.device, torch.float32 if precision == "fp32" else HALF)
    if ours is not None and program.role == "denoiser":
        try:
            swap_attention(lifted.module, suits=ours, normed=normed)
        except ValueError as error:
            raise EngineError(f"the denoiser cannot be compiled: {error}") from error
    lower(lifted, precision)
    regions, plan = cut(lifted, whole=whole)
    most = program.signature.most
    with quiet():
        traced = {name: trace(region, most=most) for name, region in regions.items()}
    return traced, plan, lifted


def trace(region: GraphModule, *, most: int) -> ExportedProgram:
    """Export a region alone, its axes varying as they did in the whole graph.

    most: the greatest size of an axis that varies.
    """
    values = [node.meta["val"] for node in region.graph.find_nodes(op="placeholder")]
    dims: dict[str, Any] = {}

    def axis(size: int | torch.SymInt) -> Any:
        if isinstance(size, int):
            return None
        name = str(size.node.shape_env.replace(size.node.expr))
        if not name.isidentifier():
            return Dim.AUTO
        return dims.setdefault(name, Dim(name, min=1, max=most))

    shapes = tuple({i: a for i, s in enumerate(v.shape) if (a := axis(s))} for v in values)
    examples = tuple(_example(value) for value in values)
    with torch.no_grad():
        return torch.export.export(region, examples, dynamic_shapes=shapes, strict=False)


def _example(value: Tensor) -> Tensor:
    sizes = [size if isinstance(size, int) else int(size.node.hint) for size in value.shape]
    return torch.zeros(sizes, dtype=value.dtype, device=value.device)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to ourselves what PyTorch says of its own future."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


def write_archive(path: Path, regions: Mapping[str, bytes]) -> None:
    """Write regions into one file; they are packed already."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in regions.items():
            archive.writestr(name, content)


def read_archive(path: Path) -> dict[str, bytes]:
    """Read the regions of a file. Raises: ModelError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is damaged ({error}). {AGAIN}") from error


def write_weights(path: Path, lifted: Lifted, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Write weights and plan beside an archive. facts: what must hold where it is opened."""
    used = {weight.name for weight in plan.weights()}
    tensors = _apart({name: t for name, t in lifted.sources.items() if name in used})
    metadata = {"plan": json.dumps(plan.to_dict()), "facts": json.dumps(facts)}
    save_file(tensors, path.with_suffix(WEIGHTS_SUFFIX), metadata=metadata)


def _apart(sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make weights small; each gets memory of its own, as a file needs it."""
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, source in sources.items():
        tensor = compact(source).cpu()
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return tensors


def open_weights(path: Path, *, device: str) -> tuple[LiveWeights, Plan]:
    """Open weights and plan beside an archive.

    Raises: ModelError if they are damaged; EngineError if what must hold here does not.
    """
    place = path.with_suffix(WEIGHTS_SUFFIX)
    try:
        file = safe_open(place, "pt")
        metadata = file.metadata()  # type: ignore[no-untyped-call]
        plan, facts = Plan.from_dict(json.loads(metadata["plan"])), json.loads(metadata["facts"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{place} is damaged ({error}). {AGAIN}") from error
    require_same(facts, facts_of(device), made="bundle was compiled")
    return LiveWeights(file.get_tensor, plan.weights(), device=device), plan


def open_runner(
    engine: str,
    path: Path,
    signature: Signature,
    *,
    device: str,
    threads: int | None,
    open_region: Callable[[bytes, Path], Compiled],
) -> PlanRunner:
    """Open an archive and its weights as a runner. open_region: of the engine, by name.

    Raises: EngineError if the device is not there, a number of threads is asked for, or the code
    was compiled for something else; ModelError if a file is damaged.
    """
    require_device(engine, device, threads)
    live, plan = open_weights(path, device=device)
    regions = {name: open_region(content, path) for name, content in read_archive(path).items()}
    return PlanRunner(regions, plan, live, signature, device=device)


def facts_of(device: str) -> dict[str, str]:
    """Say what compiled code depends on: PyTorch, and the instructions of processor or GPU."""
    facts = {"torch": torch.__version__.partition("+")[0], "device": torch.device(device).type}
    if facts["device"] == "cuda":
        return facts | {"gpu": ".".join(map(str, torch.cuda.get_device_capability(device)))}
    return facts | {"cpu": torch.backends.cpu.get_cpu_capability()}


def require_precision(precision: str, device: str) -> None:
    """Require that a processor or GPU has fast arithmetic in a precision.

    Raises: EngineError that says what to choose instead.
    """
    if torch.device(device).type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if precision == "int8":
            raise EngineError("int8 is for processors. On a GPU choose fp8 or bf16.")
        if precision == "fp8" and capability < FP8_CAPABILITY:
            raise EngineError(
                f"fp8 needs a GPU of compute capability 8.9 or later, and here it is "
                f"{capability[0]}.{capability[1]}. Choose bf16."
            )
    elif precision == "fp8":
        raise EngineError("fp8 is for GPUs. On a processor choose int8 or bf16.")
    elif precision != "fp32" and not has_fast_bf16():
        raise EngineError(f"this processor has no arithmetic in bf16, which {precision} needs.")
