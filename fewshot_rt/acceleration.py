"""Acceleration LoRAs: published updates of a base's weights, with which few steps are enough.

They are added to the weights before the user's own adapter comes, to predict or to export, never
to train. Layers are named as in diffusers, as in ComfyUI and the model's own code, or, as kohya's
tools do, with underscores for dots. Besides pairs of low rank there are whole differences of
weights ("diff"), biases ("diff_b") and modulations ("diff_m"), some of which diffusers' loader
leaves out. Here every tensor of a file counts, or the file is refused.
Axes: R rank, O I width of a layer's output and input.
Source: Hu et al. 2021, sec. 4.1; ComfyUI, comfy/lora.py; LightX2V, tools/convert/lora_loader.py.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .adapter import DIFFUSERS_METADATA, DIFFUSERS_PREFIX
from .base import Base
from .checkpoints import digest_file
from .comfy import PREFIX as COMFY_PREFIX
from .comfy import comfy_name
from .errors import ConfigError, ModelError

PREFIXES = (f"model.{COMFY_PREFIX}", COMFY_PREFIX, DIFFUSERS_PREFIX, "pipe.dit.", "lora_unet_")
# What a tensor is, by how its key ends behind the layer.
ROLES = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora_B.bias": "up_bias",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "diff_m": "diff_m",
}
# Which parameter of the layer it changes; those of low rank count alpha / rank times.
CHANGED = {
    "up": "weight",
    "up_bias": "bias",
    "diff": "weight",
    "diff_b": "bias",
    "diff_m": "modulation",
}
LOW_RANK = ("up", "up_bias")


@dataclass(frozen=True)
class Acceleration:
    """A file of LoRA weights, and how strongly it counts."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Acceleration":
        """Read FILE or FILE:SCALE. Only what is a number behind the last colon is a scale.

        Raises: ConfigError if the scale is impossible; ModelError if there is no such file.
        """
        path, _, number = text.rpartition(":")
        scale = _number(number) if path else None
        if scale is None:
            path, scale = text, 1.0
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"the scale of an acceleration LoRA is above 0, not {number}.")
        if not Path(path).is_file():
            raise ModelError(
                f"there is no file {path}. Give an acceleration LoRA as FILE or FILE:SCALE, such "
                "as lora.safetensors:0.8."
            )
        return cls(Path(path), scale)

    def to_dict(self) -> dict[str, Any]:
        """Give the file's name, a digest of its bytes, and the scale, as JSON values."""
        return {"file": self.path.name, "digest": digest_file(self.path), "scale": self.scale}


def add_acceleration(base: Base, files: Sequence[Acceleration]) -> None:
    """Add a LoRA to the weights of each transformer of a base, in their order; of none, none.

    W + scale x alpha / rank x B A is computed in fp32 and kept in the type of the weights. Layers
    stay plain.
    Raises: ModelError if the base has none published for it, or a file is damaged, does not fit
    whole, or changes nothing; ConfigError if there are not as many as transformers.
    """
    if not files:
        return
    if base.comfy_names is None:
        raise ModelError(
            f"no acceleration LoRA fits {base.name}: none is published for it. Leave out "
            "--accel-lora."
        )
    transformers = [m for m in base.denoiser().modules() if isinstance(m, ModelMixin)]
    if len(files) != len(transformers):
        raise ConfigError(
            f"{base.name} has {len(transformers)} transformer(s), and {len(files)} acceleration "
            "LoRA(s) were given. Give --accel-lora once for each, that for the noisier times first."
        )
    for file, transformer in zip(files, transformers, strict=True):
        _add(file, transformer, base)


@dataclass(frozen=True)
class _Update:
    """What is added to a parameter: share x up x down, or share x up.

    Shapes: parameter [O, I...]; up [O, R] (in convolutions [O, R, 1...]), down [R, I...], or up
    as the parameter. keys: of the tensors in the file.
    """

    keys: tuple[str, ...]
    parameter: Tensor
    up: Tensor
    down: Tensor | None
    share: float

    def fits(self) -> bool:
        shape, up, down = self.parameter.shape, self.up, self.down
        if down is None:
            return up.shape == shape
        is_inner = min(len(shape), up.ndim) > 1 and down.shape[1:] == shape[1:]
        return is_inner and up.flatten(1).shape == (shape[0], down.shape[0])

    @torch.no_grad()
    def add(self, scale: float) -> bool:
        """Add it, scaled; say whether a weight is another now."""
        parameter = self.parameter
        update = self.up.to(parameter.device).float()
        if self.down is not None:
            down = self.down.to(parameter.device).float()
            update = update.flatten(1) @ down.flatten(1)
        update = scale * self.share * update.reshape(parameter.shape)
        changed = (parameter.float() + update).to(parameter.dtype)
        is_changed = not torch.equal(parameter, changed)
        parameter.copy_(changed)
        return is_changed


def _add(file: Acceleration, transformer: nn.Module, base: Base) -> None:
    tensors, told = _read(file.path)
    parameters = _parameters(transformer, base.comfy_names or {})
    updates = [u for u in _updates(tensors, told, parameters) if u.fits()]
    used = {key for update in updates for key in update.keys}
    unused = [key for key in tensors if key not in used]
    if unused:
        raise ModelError(
            f"the acceleration LoRA {file.path} does not fit {base.name}: of its {len(tensors)} "
            f"tensors, {len(unused)} have no layer of their name and shape there, or are not "
            f"understood; the first is {unused[0]!r}. Take a file that was made for this base."
        )
    changes = [update.add(file.scale) for update in updates]
    if not any(changes):
        raise ModelError(
            f"the acceleration LoRA {file.path} changes nothing: at scale {file.scale:g} no weight "
            f"of {base.name} becomes another. Download it again, or give a larger scale."
        )


def _updates(
    tensors: Mapping[str, Tensor], told: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> Iterator[_Update]:
    """Find what each tensor is added to; those that have no place are left out."""
    layers: dict[str, dict[str, str]] = {}
    for key in tensors:
        layer, role = _place(key)
        layers.setdefault(layer, {})[role] = key
    for layer, keys in layers.items():
        share = _share(layer, {role: tensors[key] for role, key in keys.items()}, told)
        for role, end in CHANGED.items():
            parameter = parameters.get(_flat(f"{layer}.{end}"))
            if role not in keys or parameter is None or (role == "up" and "down" not in keys):
                continue
            with_it = [keys[r] for r in ("down", "alpha") if r in keys] if role == "up" else []
            yield _Update(
                keys=(keys[role], *with_it),
                parameter=parameter,
                up=tensors[keys[role]],
                down=tensors[keys["down"]] if role == "up" else None,
                share=share if role in LOW_RANK else 1.0,
            )


def _share(layer: str, parts: Mapping[str, Tensor], told: Mapping[str, Any]) -> float:
    """Give alpha / rank of a layer: by its own alpha, or that of all; 1 where none is told."""
    if "down" not in parts:
        return 1.0
    rank = max(1, parts["down"].shape[:1].numel())
    if "alpha" in parts:
        return float(parts["alpha"].float().mean()) / rank
    patterns = told.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, layer)) or told.get("lora_alpha") or rank
    return float(alpha / (math.sqrt(rank) if told.get("use_rslora") else rank))


def _place(key: str) -> tuple[str, str]:
    """Split a key into its layer and role; a role that is not known is the key itself."""
    prefix = next((p for p in PREFIXES if key.startswith(p)), "")
    name = key.removeprefix(prefix).replace(".default.", ".")
    for end, role in ROLES.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), role
    return name, key


def _parameters(transformer: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Give a transformer's parameters by their flat names, in diffusers and in ComfyUI."""
    found: dict[str, Tensor] = {}
    for name, parameter in transformer.named_parameters():
        found[_flat(name)] = found[_flat(comfy_name(name, names))] = parameter
    return found


def _flat(name: str) -> str:
    return name.replace(".", "_").lstrip("_")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file's tensors, and what diffusers tells of their rank and alpha.

    Raises: ModelError if it is damaged or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            told = json.loads((file.metadata() or {}).get(DIFFUSERS_METADATA, "{}"))
        return tensors, {name.removeprefix(DIFFUSERS_PREFIX): told[name] for name in told}
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"the acceleration LoRA {path} cannot be read ({error}). It must be a safetensors "
            "file; download it again."
        ) from error


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
