"""TorchInductor: a program that is compiled when it is opened, for the machine at hand.

Compiled code is kept in PyTorch's cache, so that a second opening takes a few seconds. Weights lie
beside the program, so that adapters can change in place.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewshot_rt.errors import ModelError
from fewshot_rt.export.engine import missing_compiler, missing_package
from fewshot_rt.predictor import Runner
from fewshot_rt.spec import Signature

if TYPE_CHECKING:
    from torch import Tensor

    from fewshot_rt.export.program import Program

name = "inductor"
precisions: tuple[str, ...] = ("fp32", "bf16", "int8", "fp8")
suffix = ".inductor"
is_live = True


def missing() -> str | None:
    """Say why it cannot run here and what to install; None if it can."""
    return missing_package("torch", install="torch (https://pytorch.org)") or missing_compiler()


def build(program: "Program", path: Path, *, precision: str) -> None:
    """Write a program, each kind of block once, and its weights beside it.

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
    from fewshot_rt.export.compiled import (
        PlanRunner,
        open_weights,
        read_archive,
        require_device,
    )

    require_device(name, device, threads)
    live, plan = open_weights(path, device=device)
    regions = {name: _compile(content, path) for name, content in read_archive(path).items()}
    return PlanRunner(regions, plan, live, signature, device=device)


def _compile(content: bytes, path: Path) -> "Callable[..., Sequence[Tensor]]":
    import torch

    from fewshot_rt.export.compiled import quiet

    try:
        exported = torch.export.load(io.BytesIO(content))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is damaged ({error}). Export it again.") from error
    values = [node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")]
    with quiet():
        compiled: Callable[..., Sequence[Tensor]] = torch._inductor.standalone_compile(
            exported.graph_module, values, dynamic_shapes="from_graph"
        )
    return compiled
