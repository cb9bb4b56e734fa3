"""AOTInductor: a program as compiled libraries, which start without compiling.

Weights lie beside the libraries, so that adapters can change in place.
"""

import io
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fewshot_rt.errors import EngineError, ModelError
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

name = "aoti"
precisions: tuple[str, ...] = ("fp32", "bf16", "int8", "fp8")
suffix = ".aoti"
is_live = True
merged: tuple[str, ...] = ()
is_fixed = False
coders = {"int8": "bf16", "fp8": "bf16"}
tiny: tuple[str, ...] = ()
calibrated: tuple[str, ...] = ()
hints: tuple[str, ...] = ()
devices = torch_devices

# Threads are counted when the code runs, not when it is built.
OPTIONS = {"cpp.dynamic_threads": True}


def missing() -> str | None:
    """Say why it cannot run here and what to install; None if it can."""
    return missing_package("torch", install="torch (https://pytorch.org)")


def build(
    program: "Program",
    path: Path,
    *,
    precision: str,
    examples: Examples = (),  # noqa: ARG001
) -> None:
    """Compile a program, each kind of block once, and write its weights beside it.

    examples: not used; scales are found at each call.

    Raises: EngineError if there is no C++ compiler, or the precision is not for this device.
    """
    from fewshot_rt.export.compiled import (
        facts_of,
        prepare,
        require_precision,
        write_archive,
        write_weights,
    )

    reason = missing_compiler()
    if reason:
        raise EngineError(f"engine 'aoti' cannot build: {reason}")
    require_precision(precision, program.device)
    regions, plan, lifted = prepare(program, precision=precision)
    write_archive(path, {name: compile_region(region) for name, region in regions.items()})
    write_weights(path, lifted, plan, facts_of(program.device))


def load(
    path: Path, signature: Signature, *, device: str = "cpu", threads: int | None = None
) -> Runner:
    """Open the libraries and the weights.

    Raises: EngineError if the device is not there, a number of threads is asked for, or the code
    was compiled for another processor, GPU or PyTorch; ModelError if a file is damaged.
    """
    from fewshot_rt.export.compiled import open_runner

    opener = partial(open_region, device=device)
    return open_runner(name, path, signature, device=device, threads=threads, open_region=opener)


def compile_region(region: "ExportedProgram") -> bytes:
    """Compile a region into a package."""
    import torch

    from fewshot_rt.export.compiled import quiet

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "region.pt2"
        torch._inductor.aoti_compile_and_package(
            region, package_path=str(path), inductor_configs=dict(OPTIONS)
        )
        return path.read_bytes()


def open_region(
    content: bytes, path: Path, *, device: str = "cpu"
) -> "Callable[..., Sequence[Tensor]]":
    """Open a package. Raises: ModelError that names `path` if it is damaged."""
    import torch

    # On a GPU calls are recorded as a graph, during which no call may wait for another one's end.
    is_alone = torch.device(device).type == "cuda"
    try:
        opened: Callable[..., Sequence[Tensor]] = torch._inductor.aoti_load_package(
            io.BytesIO(content), run_single_threaded=is_alone
        )
    except RuntimeError as error:
        raise ModelError(f"{path} is damaged ({error}). {AGAIN}") from error
    return opened
