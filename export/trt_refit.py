"""Adapters in a TensorRT engine: weights that are set anew in it, and what shows that they were.

An engine's refittable weights are those of its products. They lie beside it, as the base has them,
and an adapter is added to them on the way into the engine. Whether they arrived is seen in what
the engine answers: a GEMM may lose its bias in refittable engines (TensorRT 11.3, known issues),
and weights that an adapter leaves behind must be the base's again (NVIDIA/TensorRT #3628).
Axes: N channels out, K channels in, R rank.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.files import whole

from .engine import AGAIN
from .live import Update, merged, require_shape
from .parity import compare, require

if TYPE_CHECKING:
    from .program import Program

ATEN = torch.ops.aten
PRODUCTS = (ATEN.linear.default, ATEN.conv2d.default, ATEN.conv3d.default)
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BASE = "base"  # the key of what is answered without an adapter

Fill = Callable[[str], Tensor]  # gives a weight as the engine has it, by its name there
Push = Callable[[Iterable[str], Fill], None]  # sets weights in the engine, by their names there
Answer = Callable[[], Mapping[str, np.ndarray]]  # what the engine makes of one example


@dataclass(frozen=True)
class Slot:
    """Where an engine has a weight: its name there, its type, and whether it is [K, N] there."""

    name: str
    dtype: str
    is_transposed: bool

    def fill(self, weight: Tensor) -> Tensor:
        """Give a weight as the engine has it. Shapes: [N, K], or of a convolution [N, K, ...]."""
        placed = weight.t() if self.is_transposed else weight
        return placed.to(TYPES[self.dtype]).contiguous()


def product_weights(program: "Program") -> dict[str, tuple[int, ...]]:
    """Give the weights of linear layers and convolutions with their shapes, by name."""
    signature, graph = program.exported.graph_signature, program.exported.graph
    names = {
        spec.arg.name: spec.target
        for spec in signature.input_specs
        if spec.kind is not InputKind.USER_INPUT and spec.target is not None
    }
    taken = [node.args[1] for node in graph.nodes if node.target in PRODUCTS]
    return {
        names[weight.name]: tuple(weight.meta["val"].shape)
        for weight in taken
        if weight.name in names
    }


class RefitWeights:
    """The weights of an engine that adapters change, in place of `LiveWeights`.

    read: gives a weight of the base by name. slots: where the engine has it. push: it may ask for
    other weights of the slots, too. answers: where to keep what was answered with each adapter, a
    path without its ending; `BASE` is there already. tolerance: how near the engine must come to
    it, a line of `TOLERANCES`.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        slots: Mapping[str, Slot],
        *,
        push: Push,
        answer: Answer,
        answers: Path,
        tolerance: str,
    ) -> None:
        self._read, self._slots, self._push = read, slots, push
        self._answer, self._answers, self._tolerance = answer, answers, tolerance
        self._names = {slot.name: name for name, slot in slots.items()}
        # What the engine should have now, had before, and which weights may not be the base's.
        self._updates: Mapping[str, Update] = {}
        self._earlier: Mapping[str, Update] = {}
        self._touched: dict[str, None] = {}
        self._is_changed = False
        self._last: Mapping[str, np.ndarray] = {}

    def fill(self) -> None:
        """Give an engine that was built without weights those of the base, and check its answer.

        Raises: EngineError if the engine does not take them, or answers otherwise than it should.
        """
        self._push(self._names, self._fill)
        self._check(BASE)

    def use(self, updates: Mapping[str, Update]) -> None:
        """Make the weights those of the base with these updates, and with no earlier ones.

        Sums are made in fp32 from the base's weights. The first answer with an adapter is kept, to
        be met by later ones; that it is the right one is for the parity with eager to say.

        Raises: ModelError if there is no such weight, or its shape is another, and nothing is
        changed; EngineError if the engine then answers otherwise than it should.
        """
        for name, update in updates.items():
            self._require(name, update)
        self._earlier, self._updates = self._updates, dict(updates)
        self._touched |= dict.fromkeys(updates)
        self._is_changed = False
        self._push([self._slots[name].name for name in self._touched], self._fill)
        self._check(digest(updates) if updates else BASE)
        self._touched = dict.fromkeys(updates)

    def _require(self, name: str, update: Update) -> None:
        if name not in self._slots:
            raise ModelError(f"the adapter changes {name}, which this engine keeps as it is.")
        require_shape(name, update, self._read(name), holder="engine")

    @torch.no_grad()
    def _fill(self, place: str) -> Tensor:
        """Give a weight with its update, as the engine has it. Raises: EngineError if unknown."""
        if place not in self._names:
            raise EngineError(f"the engine asks for {place}, which is not beside it. {AGAIN}")
        name = self._names[place]
        weight = self._weight(name, self._updates)
        if not self._is_changed:
            self._is_changed = not torch.equal(weight, self._weight(name, self._earlier))
        return weight

    def _weight(self, name: str, updates: Mapping[str, Update]) -> Tensor:
        weight = self._read(name).float()
        if name in updates:
            weight = merged(weight, updates[name])
        return self._slots[name].fill(weight)

    def _check(self, key: str) -> None:
        """Compare an answer with the one that is kept, or keep it.

        Raises: EngineError if they differ, or if weights changed and the answer did not.
        """
        found, last = dict(self._answer()), self._last
        if self._is_changed and all(np.array_equal(found[name], last[name]) for name in last):
            raise EngineError("the engine answers as before: its weights were not set anew.")
        self._last = found
        kept = read_answer(self._answers, key)
        if kept is None:
            write_answer(self._answers, key, found)
        else:
            require(compare(kept, found), role="refit", tolerance=self._tolerance)


def read_answer(answers: Path, key: str) -> dict[str, np.ndarray] | None:
    """Read an answer that is kept; None if there is none. Raises: ModelError if it is damaged."""
    path = _path(answers, key)
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({error}).") from error


def write_answer(answers: Path, key: str, answer: Mapping[str, np.ndarray]) -> None:
    """Keep an answer. Raises: DataError if the disk is full or the place cannot be written to."""
    with whole(_path(answers, key)) as temporary, temporary.open("wb") as file:
        np.savez(file, **answer)  # type: ignore[arg-type]


def digest(updates: Mapping[str, Update]) -> str:
    """Name updates by their contents."""
    found = hashlib.sha256()
    for name, (down, up, scale) in sorted(updates.items()):
        found.update(f"{name} {scale!r}".encode())
        for part in (down, up):
            found.update(part.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _path(answers: Path, key: str) -> Path:
    return answers.with_name(f"{answers.name}-{key}.npz")
