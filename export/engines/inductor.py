"""TorchInductor: a program that is compiled when it is opened, for the machine at hand.

Compiled code is kept in PyTorch's cache, so that a second opening takes a few seconds. Weights lie
beside the program, so that adapters can change in place.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewshot_rt.errors import ModelError
from fewshot_rt.export.engine import (
    AGAIN,
    Examples,
    missing_compiler,
    missing_package,
    torch_devices,
)
from fewshot_rt.predictor import Runner
from fewshot_rt.spec import Signature

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from fewshot_rt.export.program import Program

name = "inductor"
precisions: tuple[str, ...] = ("fp32", "bf16", "int8", "fp8")
suffix = ".inductor"
is_live = True
merged: tuple[str, ...] = ()
is_fixed = False
coders = {"int8": "bf16", "fp8": "bf16"}
tiny: tuple[str, ...] = ()
calibrated: tuple[str, ...] = ()
hints: tuple[str, ...] = ()
devices = torch_devices

# Earlier ones take the sizes of an example as fixed, unless the graph carries it where Dynamo's do,
# and fail on sizes that were read from a file, so that such graphs are traced once more.
KNOWS_SIZES = (2, 13)


def missing() -> str | None:
    """Say why it cannot run here and what to install; None if it can."""
    return missing_package("torch", install="torch (https://pytorch.org)") or missing_compiler()


def build(
    program: "Program",
    path: Path,
    *,
    precision: str,
    examples: Examples = (),  # noqa: ARG001
) -> None:
    """Write a program, each kind of block once, and its weights beside it.

    examples: not used; scales are found at each call.

    Raises: EngineError if the precision is not for this device.
    """
    import torch

    from fewshot_rt.export.compiled import (
        prepare,
        require_precision,
        write_archive,
        write_weights,
    )

    require_precision(precision, program.device)
    regions, plan, lifted = prepare(program, precision=precision)
    packed = {}
    for name, region in regions.items():
        region.example_inputs = None  # zeros as large as the weights
        file = io.BytesIO()
        torch.export.save(region, file)
        packed[name] = file.getvalue()
    write_archive(path, packed)
    write_weights(path, lifted, plan, {})


def load(
    path: Path, signature: Signature, *, device: str = "cpu", threads: int | None = None
) -> Runner:
    """Compile the program for what is here.

    Raises: EngineError if the device is not there, or a number of threads is asked for; ModelError
    if a file is damaged.
    """
    from fewshot_rt.export.compiled import open_runner

    return open_runner(
        name, path, signature, device=device, threads=threads, open_region=_open_region
    )


def compile_region(region: "ExportedProgram") -> "Callable[..., Sequence[Tensor]]":
    """Compile a region for the machine at hand."""
    import copy

    import torch

    from fewshot_rt.export.compiled import quiet, trace

    is_early = tuple(map(int, torch.__version__.split(".")[:2])) < KNOWS_SIZES
    if is_early:
        most = max((int(r.upper) for r in region.range_constraints.values()), default=1)
        region = trace(region.graph_module, most=most)
    # A copy: not every PyTorch leaves the graph as it was.
    graph = copy.deepcopy(region.graph_module)
    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    for node in graph.graph.output_node().all_input_nodes if is_early else ():
        node.meta["example_value"] = node.meta["val"]
    with quiet():
        compiled: Callable[..., Sequence[Tensor]] = torch._inductor.standalone_compile(
            graph, values, dynamic_shapes="from_graph"
        )
    return compiled


def _open_region(content: bytes, path: Path) -> "Callable[..., Sequence[Tensor]]":
    import torch

    try:
        region = torch.export.load(io.BytesIO(content))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is damaged ({error}). {AGAIN}") from error
    return compile_region(region)
