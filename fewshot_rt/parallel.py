"""Several processes that train one model, each on its own share of a batch, as torchrun starts
them.
"""

import os
from collections.abc import Iterable

import torch
from torch import distributed, nn

from .errors import ConfigError


def join(device: str) -> tuple[int, int]:
    """Join the other processes; give this one's rank and their number, (0, 1) if it is alone.

    On cuda, every process takes a GPU of its own, which is "cuda" to it from then on.
    Raises: ConfigError if there are more processes than GPUs.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        return 0, 1
    if device.startswith("cuda"):
        own, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= there:
            raise ConfigError(f"there are {there} GPUs: give torchrun --nproc-per-node {there}.")
        torch.cuda.set_device(own)
    if not distributed.is_initialized():
        # Its functions take the group of the moment they are first imported (which Optimiser
        # does) as a default, and then keep it, with its threads, beyond leave(): gloo's may
        # abort the process as it ends.
        from torch.distributed.nn import functional  # noqa: F401

        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


def own_rank() -> int:
    """Give this process's rank; 0 if it is alone."""
    return distributed.get_rank() if _is_joined() else 0


def leave() -> None:
    """Part from the other processes, if there are any."""
    if _is_joined():
        distributed.destroy_process_group()


def agree(value: float) -> float:
    """Give the first process's value in all of them."""
    if not _is_joined():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    if distributed.get_backend() == "nccl":
        shared = shared.cuda()
    distributed.broadcast(shared, src=0)
    return float(shared)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes; alone, leave all as it is.

    Where one process has none, as of an expert that its batch did not need, it counts as zero.
    """
    if not _is_joined():
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def _is_joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
