"""Weights outside of compiled code: an adapter is merged into them while the code stays.

Axes: N channels out, K channels in, R rank.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fewshot_rt.errors import ModelError

from .forms import derive
from .lifted import Weight


class Update(NamedTuple):
    """The update of one weight: scale x up down. Shapes: down [R, K]; up [N, R].

    Those of a convolution have its kernel's axes behind: down all, up ones.

    Source: Hu et al. 2021 (LoRA), sec. 4.1.
    """

    down: Tensor
    up: Tensor
    scale: float


class LiveWeights:
    """The weights that compiled code reads, in their forms, and the untouched ones behind them.

    read: gives a weight of the base by name; those that an adapter changes are read once more, and
    kept. forms: what the code takes.
    """

    def __init__(
        self, read: Callable[[str], Tensor], forms: Iterable[Weight], *, device: str = "cpu"
    ) -> None:
        self._read, self._device = read, device
        self._pristine: dict[str, Tensor] = {}
        self._changed: set[str] = set()
        self.tensors: dict[Weight, Tensor] = {}
        self._forms: dict[str, list[Weight]] = {}
        for weight in forms:
            self._forms.setdefault(weight.name, []).append(weight)
        for name, known in self._forms.items():
            source = read(name).to(device)
            self.tensors |= {weight: _own(derive(source, weight.form), source) for weight in known}

    @torch.no_grad()
    def use(self, updates: Mapping[str, Update]) -> None:
        """Make the weights those of the base with these updates, and with no earlier ones.

        Sums are made in fp32 from the untouched weights, so none leaves a trace. No updates give
        the base's own bits back.

        Raises: ModelError if there is no such weight, or its shape is another; nothing is changed.
        """
        for name, update in updates.items():
            self._require(name, update)
        for name in self._changed | set(updates):
            source = self._pristine[name]
            if name in updates:
                source = merged(source, updates[name])
            for weight in self._forms[name]:
                self.tensors[weight].copy_(derive(source, weight.form))
        self._changed = set(updates)

    def _require(self, name: str, update: Update) -> None:
        if name not in self._forms:
            raise ModelError(f"the adapter changes {name}, which this bundle does not have.")
        if name not in self._pristine:
            self._pristine[name] = self._read(name).to(self._device)
        require_shape(name, update, self._pristine[name], holder="bundle")


def _own(tensor: Tensor, source: Tensor) -> Tensor:
    """Give a tensor that does not share the memory of its source, which may be a file's."""
    is_shared = tensor.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    return tensor.clone() if is_shared else tensor


def require_shape(name: str, update: Update, weight: Tensor, *, holder: str) -> None:
    """Require that an update is for a weight of this shape. holder: what has it, for the message.

    Raises: ModelError.
    """
    shape = list(weight.flatten(1).shape)
    given = [len(update.up), update.down.flatten(1).shape[1]]
    if shape != given:
        raise ModelError(f"the adapter's {name} is {given}, and this {holder}'s is {shape}.")


def merged(source: Tensor, update: Update) -> Tensor:
    """Give a weight with an update, in fp32 and where the weight is. Shapes: [N, K, ...]."""
    down, up = (part.to(source.device, torch.float32) for part in (update.down, update.up))
    product = up.flatten(1) @ down.flatten(1)
    return source.float() + product.view(source.shape) * update.scale


def compact(tensor: Tensor) -> Tensor:
    """Give the same values in half the bits where that is possible, as of published weights."""
    if tensor.dtype is not torch.float32:
        return tensor
    for half in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(half).float(), tensor):
            return tensor.to(half)
    return tensor
