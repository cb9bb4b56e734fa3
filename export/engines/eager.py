"""The captured graph itself, run by PyTorch: the reference among the engines."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fewshot_rt.errors import ModelError
from fewshot_rt.export.engine import (
    Examples,
    make_runner,
    missing_package,
    require_device,
    torch_devices,
)
from fewshot_rt.predictor import Runner
from fewshot_rt.spec import Signature

if TYPE_CHECKING:
    from fewshot_rt.export.program import Program

name = "eager"
precisions: tuple[str, ...] = ("fp32",)
suffix = ".pt2"
is_live = False
merged: tuple[str, ...] = ()
is_fixed = False
coders: dict[str, str] = {}
tiny: tuple[str, ...] = ()
calibrated: tuple[str, ...] = ()
hints: tuple[str, ...] = ()
devices = torch_devices


def missing() -> str | None:
    """Say why it cannot run here and what to install; None if it can."""
    return missing_package("torch", install="torch (https://pytorch.org)")


def build(program: "Program", path: Path, *, precision: str, examples: Examples = ()) -> None:  # noqa: ARG001
    """Write the graph and its weights. precision: that of the program, fp32. examples: not used."""
    import torch

    # Through a Python file, so that a full disk is the OSError that it is.
    with path.open("wb") as file:
        torch.export.save(program.exported, file)


def load(
    path: Path, signature: Signature, *, device: str = "cpu", threads: int | None = None
) -> Runner:
    """Open the graph.

    Raises: EngineError if the device is not there or a number of threads is asked for (PyTorch has
    one for the whole process: torch.set_num_threads), ModelError if the file is damaged.
    """
    import torch

    require_device(name, device, threads)
    try:
        exported = torch.export.load(path)
    except (OSError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is damaged ({error}). Export it again.") from error
    module = exported.module().to(device)

    @torch.inference_mode()
    def run(tensors: list[np.ndarray]) -> list[np.ndarray]:
        results = module(*(torch.from_numpy(tensor).to(device) for tensor in tensors))
        return [result.cpu().numpy() for result in results]

    return make_runner(signature, run)
