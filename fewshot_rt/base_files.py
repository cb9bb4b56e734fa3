"""A base like pocket as a folder in diffusers' format, with its card."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .autoencoder import TinyVideoAutoencoder
from .bases.pocket import WEIGHT_FILE
from .files import whole, write_json, write_text
from .world import EVENTS, VOCABULARY


def write_base(
    folder: Path,
    *,
    weights: Mapping[str, Tensor],
    transformer: Mapping[str, Any],
    autoencoder: TinyVideoAutoencoder,
    words: Tensor,
    index: dict[str, Any],
) -> None:
    """Write a base in fp16, for `open_base(str(folder))`.

    weights: of the transformer, by name. transformer: its sizes. words: embeddings of the world's
    vocabulary, [words, D]. index: what `model_index.json` says besides the revision, which is a
    digest of all weights.
    Raises: DataError if the disk is full or the folder cannot be written to.
    """
    index = index | {"revision": _digest({**weights, **autoencoder.state_dict(), "words": words})}
    _write_weights(folder / "transformer" / WEIGHT_FILE, weights)
    _write_weights(folder / "vae" / WEIGHT_FILE, autoencoder.state_dict())
    _write_weights(folder / "prompt" / "embeddings.safetensors", {"embeddings": words})
    write_json(folder / "prompt" / "words.json", list(VOCABULARY))
    write_json(folder / "vae" / "config.json", autoencoder.config.to_dict())
    config = {"_class_name": "WanTransformer3DModel", **transformer}
    write_json(folder / "transformer" / "config.json", config)
    write_json(folder / "model_index.json", index)
    write_text(folder / "README.md", _card(index))


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    with whole(path) as temporary:
        save_file({k: v.detach().cpu().half().contiguous() for k, v in weights.items()}, temporary)


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _card(index: dict[str, Any]) -> str:
    minutes, steps, settings = index["minutes"], index["steps"], index["settings"]
    native = "x".join(map(str, index["native"]))
    return f"""---
license: apache-2.0
library_name: diffusers
tags: [image-to-video, few-shot, fewshot-rt]
---

# {index["name"]} (revision {index["revision"]})

A small image-to-video diffusion model for few-shot adapters, made by `fewshot-rt pretrain`: the
transformer of the Wan family (the first frame enters as channels; flow matching) over the latents
of a tiny frame-wise video autoencoder. Native size {native}, 5 or 9 frames.

- **Data**: only the procedural world of `fewshot_rt.world` ({len(EVENTS)} events); no
  photographs, no downloaded data.
- **Training**: autoencoder {_origin(index)},
  denoiser {steps["denoiser"]} steps in {minutes["denoiser"]} minutes on {settings["device"]}; batch
  {settings["batch"]} at half size, then {settings["batch"] // 4} at native size.{_first(index)}
- **Prompts**: the words in `prompt/words.json`; all others say nothing.
- **Use**: adapters from a few pairs. By itself it is a toy.
- **Kept out on purpose**: vertical flip, jigsaw, keypoints.

Settings: `{json.dumps(settings)}`
"""


def _first(index: dict[str, Any]) -> str:
    """List what went before, newest first."""
    before = "".join(f"\n  - {line}" for line in index["initialised_from"])
    return f"\n- **Before that**, newest first:{before}" if before else ""


def _origin(index: dict[str, Any]) -> str:
    if index["autoencoder_from"]:
        return f"that of {index['autoencoder_from']}"
    return f"{index['steps']['autoencoder']} steps in {index['minutes']['autoencoder']} minutes"
