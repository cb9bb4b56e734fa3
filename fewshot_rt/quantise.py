"""Frozen weights in 8 or 4 bits, with bitsandbytes: for training on small GPUs."""

from typing import Any

from torch import nn

from .errors import ModelError


def quantise(module: nn.Module, kind: str) -> None:
    """Keep the weights of all layers in repeated blocks in 8 bits ("int8") or 4 ("nf4").

    Weights are quantised when the module next goes to a device. Activations stay as they are.
    Source: Dettmers et al. 2022 (LLM.int8); Dettmers et al. 2023 (QLoRA, nf4).
    Raises: ModelError if bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            f"weights of kind {kind} need bitsandbytes: pip install 'fewshot-rt[quantised]'."
        ) from error
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and _is_repeated(module, name):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, _quantised(bitsandbytes.nn, layer, kind))


def _is_repeated(module: nn.Module, name: str) -> bool:
    """Say whether a layer is in one of a list of blocks that lies at the top of a transformer."""
    parents = name.split(".")
    return any(
        isinstance(module.get_submodule(".".join(parents[:depth])), nn.ModuleList)
        for depth in (1, 2)
        if depth < len(parents)
    )


def _class_for_training(library: Any) -> Any:
    """Give the 4-bit layer that stays in training: its way of evaluating has no gradients."""

    class Linear4bit(library.Linear4bit):  # type: ignore[misc]
        def train(self, mode: bool = True) -> "Linear4bit":  # noqa: ARG002
            super().train(True)
            return self

    return Linear4bit


def _quantised(library: Any, layer: nn.Linear, kind: str) -> nn.Module:
    sizes = (layer.in_features, layer.out_features)
    weight = layer.weight.data
    if kind == "nf4":
        new = _class_for_training(library)(*sizes, bias=layer.bias is not None, quant_type="nf4")
        new.weight = library.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        new = library.Linear8bitLt(*sizes, bias=layer.bias is not None, has_fp16_weights=False)
        new.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if layer.bias is not None:
        new.bias = layer.bias
    quantised: nn.Module = new
    return quantised
