"""LoRA weights of one task, and where they came from.

Saved as PEFT saves an adapter (`adapter/`), as diffusers saves LoRA weights for a pipeline
(`pytorch_lora_weights.safetensors`, and one with `_2` for a second transformer), and, where ComfyUI
has the model, under its names (`comfyui_lora_weights.safetensors`, and one with `_2`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .base import Base
from .comfy import comfy_weights
from .errors import ModelError
from .files import whole, write_json

PEFT_PREFIX = "base_model.model."
DIFFUSERS_PREFIX = "transformer."
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
# Names of weights in a base of two transformers begin so; diffusers takes a file for each, and so
# does ComfyUI. The weights of a base of one transformer go where those of the first go.
EXPERT_FILES = {
    "transformer.": DIFFUSERS_FILE,
    "transformer_2.": "pytorch_lora_weights_2.safetensors",
}
COMFY_FILES = {
    "transformer.": "comfyui_lora_weights.safetensors",
    "transformer_2.": "comfyui_lora_weights_2.safetensors",
}
# The key under which diffusers looks for rank and alpha in the metadata of such a file.
DIFFUSERS_METADATA = "lora_adapter_metadata"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where an adapter came from: base and revision, task digest, shots, seed, steps, versions."""

    base: str
    revision: str
    task: str
    digest: str
    shots: int
    seed: int
    objective: str
    steps: int = 0
    versions: dict[str, str]

    def with_steps(self, steps: int) -> "Provenance":
        """Give the same with the number of steps that were trained."""
        return replace(self, steps=steps)


@dataclass(frozen=True)
class Adapter:
    """LoRA weights by the names of the base's layers, their sizes, and where they came from.

    weights: "blocks.0.attn1.to_q.lora_A.weight" and so on. The update of a layer is
    alpha / rank x B A (Hu et al. 2021, sec. 4.1).
    comfy_names: those of the base; None, as after loading, saves nothing for ComfyUI.
    """

    config: LoraConfig
    weights: Mapping[str, Tensor]
    provenance: Provenance
    comfy_names: Mapping[str, str] | None = None

    def merge(self, base: Base) -> None:
        """Add the update to the weights of a base and leave plain layers behind.

        The sum has the type of the weights: in bf16, what is below half a unit of theirs is lost.

        Raises: ModelError if the adapter was made for another base or does not fit it whole.
        """
        transformer = _transformer(base)
        self._require_base(base)
        _inject(self.config, transformer)
        self._load_into(transformer)
        merge_layers(transformer)

    def attach(self, base: Base) -> None:
        """Put the adapter into a base without merging it; its weights can be trained on.

        Raises: ModelError if the adapter was made for another base or does not fit it whole.
        """
        self._require_base(base)
        _inject(self.config, _transformer(base))
        self._load_into(_transformer(base))

    def save(self, folder: Path) -> None:
        """Write `adapter/` and the files for diffusers and ComfyUI into a run folder, each whole.

        Raises: DataError if the disk is full or the folder cannot be written to.
        """
        plain = {name: value.detach().cpu().contiguous() for name, value in self.weights.items()}
        config = {k: _as_json(v) for k, v in self.config.to_dict().items()}
        _write_tensors(folder / "adapter" / WEIGHTS_FILE, _with_prefix(plain, PEFT_PREFIX), {})
        write_json(folder / "adapter" / CONFIG_FILE, config)
        write_json(folder / "adapter" / PROVENANCE_FILE, asdict(self.provenance))
        metadata = json.dumps(_with_prefix(config, DIFFUSERS_PREFIX), sort_keys=True)
        for expert, part in _by_expert(plain).items():
            named = _with_prefix(part, DIFFUSERS_PREFIX)
            _write_tensors(folder / EXPERT_FILES[expert], named, {DIFFUSERS_METADATA: metadata})
            if self.comfy_names is not None:
                named = comfy_weights(part, self.comfy_names, alpha=self.config.lora_alpha)
                _write_tensors(folder / COMFY_FILES[expert], named, {})

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Read the adapter of a run folder.

        Raises: ModelError if it is missing or damaged.
        """
        place = folder / "adapter"
        if not place.is_dir():
            raise ModelError(f"{folder} holds no adapter. Train one: fewshot-rt train PAIRS.")
        try:
            # An absolute path: a relative one that is not there would be looked up on the Hub.
            config = LoraConfig.from_pretrained(str(place.resolve()))
            weights = load_file(place / WEIGHTS_FILE)
            provenance = Provenance(
                **json.loads((place / PROVENANCE_FILE).read_text(encoding="utf-8"))
            )
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"the adapter in {place} is damaged ({error}). Train it again, or restore the "
                "files."
            ) from error
        plain = {name.removeprefix(PEFT_PREFIX): value for name, value in weights.items()}
        return cls(config, plain, provenance)

    def _require_base(self, base: Base) -> None:
        made_for = (self.provenance.base, self.provenance.revision)
        if made_for != (base.name, base.revision):
            raise ModelError(
                f"this adapter was made for base {made_for[0]!r} revision {made_for[1]}, but the "
                f"base at hand is {base.name!r} revision {base.revision}. Use that base, or train "
                "again."
            )

    def _load_into(self, transformer: nn.Module) -> None:
        expected = set(get_peft_model_state_dict(transformer))
        if expected != set(self.weights):
            missing = len(expected - set(self.weights))
            extra = len(set(self.weights) - expected)
            raise ModelError(
                f"the adapter does not load whole: {missing} of {len(expected)} tensors are "
                f"missing and {extra} are not known to the base."
            )
        try:
            set_peft_model_state_dict(transformer, dict(self.weights))
        except RuntimeError as error:
            raise ModelError(f"the adapter does not fit the base: {error}") from error


def add_lora(base: Base, *, rank: int, alpha: int, seed: int) -> list[tuple[str, nn.Parameter]]:
    """Attach a fresh adapter to a base and give its parameters by name; B starts at zero.

    Raises: ModelError if the base has none of the layers that it names.
    """
    transformer = _transformer(base)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(base.lora_targets), init_lora_weights=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            _inject(config, transformer)
        except ValueError as error:
            raise ModelError(f"the adapter cannot be attached to {base.name}: {error}") from error
    return [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]


def is_exact(base: Base) -> bool:
    """Say whether a base keeps all its weights in fp32, so that merging rounds nothing off."""
    return {p.dtype for p in base.denoiser().parameters()} == {torch.float32}


def snapshot(base: Base, provenance: Provenance) -> Adapter:
    """Take a copy of the adapter that is attached to a base, as it is now."""
    transformer = _transformer(base)
    layer = next(m for m in transformer.modules() if isinstance(m, BaseTunerLayer))
    config = LoraConfig(
        r=layer.r["default"],
        lora_alpha=layer.lora_alpha["default"],
        target_modules=list(base.lora_targets),
    )
    weights = {k: v.detach().clone() for k, v in get_peft_model_state_dict(transformer).items()}
    return Adapter(config, weights, provenance, base.comfy_names)


def merge_layers(module: nn.Module) -> None:
    """Merge every attached adapter into its layer and put the plain layer in its place."""
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge(safe_merge=True)
        parent_name, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent_name), child, layer.get_base_layer())


def _inject(config: LoraConfig, transformer: nn.Module) -> None:
    """Put fresh LoRA layers into a transformer, in fp32 whatever its own weights are in.

    Raises: ValueError if it has none of the layers.
    """
    inject_adapter_in_model(config, transformer)
    for layer in transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            for name in layer.adapter_layer_names:
                getattr(layer, name).float()


def _transformer(base: Base) -> nn.Module:
    return base.denoiser().get_submodule("transformer")


def _with_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in values.items()}


def _by_expert(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort weights by their transformer, a key of `EXPERT_FILES`; named as in one transformer."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        expert = next((e for e in EXPERT_FILES if name.startswith(e)), next(iter(EXPERT_FILES)))
        parts.setdefault(expert, {})[name.removeprefix(expert)] = value
    return parts


def _as_json(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value.value if hasattr(value, "value") else value


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})
