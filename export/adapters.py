"""Adapters beside a bundle's base: their files, and how they get into live weights."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.predictor import Adapted, Recipe, Runner

from .engine import AGAIN

if TYPE_CHECKING:
    from fewshot_rt.adapter import Adapter

    from .live import LiveWeights, Update

# Where the layers that an adapter names are in the captured denoiser.
PLACE = "denoiser.transformer."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def updates_of(adapter: "Adapter") -> "dict[str, Update]":
    """Give the updates of an adapter by the names of the weights in the captured denoiser."""
    from .live import Update

    scale = adapter.config.lora_alpha / adapter.config.r
    layers = [name.removesuffix(DOWN) for name in adapter.weights if name.endswith(DOWN)]
    return {
        f"{PLACE}{layer}.weight": Update(
            adapter.weights[layer + DOWN], adapter.weights[layer + UP], scale
        )
        for layer in layers
    }


def write_updates(path: Path, updates: "Mapping[str, Update]") -> None:
    """Write updates as one file."""
    from safetensors.torch import save_file as save_tensors

    tensors = {f"{name}/down": update.down for name, update in updates.items()}
    tensors |= {f"{name}/up": update.up for name, update in updates.items()}
    scales = {name: update.scale for name, update in updates.items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(plain, path, metadata={"scales": json.dumps(scales)})


def read_updates(path: Path) -> "dict[str, Update]":
    """Read updates from a file. Raises: ModelError if it is damaged."""
    from .live import Update

    try:
        with safe_open(path, "pt") as file:
            scales: dict[str, float] = json.loads(file.metadata()["scales"])
            return {
                name: Update(file.get_tensor(f"{name}/down"), file.get_tensor(f"{name}/up"), scale)
                for name, scale in scales.items()
            }
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged ({error}). {AGAIN}") from error


def live_of(runner: "Runner") -> "LiveWeights":
    """Give the live weights of a runner.

    Raises: EngineError if its weights are part of its code.
    """
    live: Any = getattr(runner, "live", None)
    if live is None:
        raise EngineError(
            "the weights of this engine are part of its code. Export for 'aoti', 'inductor' or "
            "'trt' to change adapters in place."
        )
    found: LiveWeights = live
    return found


def read_prompt(path: Path) -> dict[str, np.ndarray]:
    """Read an embedded prompt. Raises: ModelError if it is damaged."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged ({error}). {AGAIN}") from error


def write_prompt(path: Path, prompt: Mapping[str, np.ndarray]) -> None:
    """Write an embedded prompt."""
    save_file({name: np.ascontiguousarray(value) for name, value in prompt.items()}, path)


@dataclass(frozen=True)
class Held:
    """What a manifest says of one adapter: its file and its prompt's, and its recipe."""

    file: str
    prompt: str
    recipe: Recipe

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Held":
        """Read it from the JSON of a manifest."""
        recipe = Recipe.from_dict(values["recipe"])
        return cls(str(values["file"]), str(values["prompt"]), recipe)


class Adapters(Mapping[str, Adapted]):
    """The adapters of a bundle by name; each, called, becomes that of the live weights.

    Files are read at the first call of each.
    """

    def __init__(self, folder: Path, held: Mapping[str, Held], runner: Runner) -> None:
        self._folder, self._held, self._live = folder, held, live_of(runner)
        self._read: dict[str, tuple[Mapping[str, Update], Mapping[str, np.ndarray]]] = {}

    def __getitem__(self, name: str) -> Adapted:
        held = self._held[name]

        def use() -> tuple[Recipe, Mapping[str, np.ndarray]]:
            if name not in self._read:
                read = read_updates(self._folder / held.file)
                self._read[name] = read, read_prompt(self._folder / held.prompt)
            updates, prompt = self._read[name]
            self._live.use(updates)
            return held.recipe, prompt

        return use

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)
