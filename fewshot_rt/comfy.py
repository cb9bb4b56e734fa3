"""An adapter's weights as ComfyUI has them.

ComfyUI looks for a layer under "diffusion_model." and the name in its own model; beside lora_A and
lora_B it takes the layer's alpha, and scales by alpha / rank as PEFT does.
Source: ComfyUI, comfy/lora.py (`model_lora_keys_unet`, `load_lora`), comfy/weight_adapter/lora.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "diffusion_model."


def comfy_weights(
    weights: Mapping[str, Tensor], names: Mapping[str, str], *, alpha: float
) -> dict[str, Tensor]:
    """Name an adapter's weights as ComfyUI does, and put its alpha beside each layer.

    weights: "blocks.0.attn1.to_q.lora_A.weight" and so on. names: see `Base.comfy_names`.
    """
    named = {}
    for name, value in weights.items():
        layer, side = name.split(".lora_")
        layer = PREFIX + comfy_name(layer, names)
        named[f"{layer}.lora_{side}"] = value
        named[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return named


def comfy_name(layer: str, names: Mapping[str, str]) -> str:
    """Name a layer as ComfyUI does, by its whole parts: "attn1.to_q" is none of "attn1.to_qk".

    A part that begins with a dot is one with nothing before it.
    """
    dotted = f"..{layer}."
    for part, theirs in names.items():
        dotted = dotted.replace(f".{part}.", f".{theirs}.")
    return dotted.strip(".")
