"""The official pipelines of diffusers over a base's own networks: a picture in, the last frame out.

The prompt comes embedded, so that embedding it costs the pipelines nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewshot_rt.cards import Card


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a pipeline is run. guidance: 1 for none, which takes one pass a step instead of two."""

    frames: int
    steps: int
    guidance: float = 1.0


# What the families' pipelines, or their examples, take.
GUIDANCE = {"cogvideox": 6.0, "wan": 5.0, "ltx": 3.0}
# The fewest steps that give numbers: LTX's scheduler stretches times by the last one, and with a
# single step that divides by zero.
LEAST_STEPS = {"cogvideox": 1, "wan": 1, "ltx": 2}


class Official:
    """The official pipeline of a base at one size (H, W). Shapes: prompt [1, L, D], embedded."""

    def __init__(self, card: Card, base: Any, size: tuple[int, int], prompt: Tensor) -> None:
        self._pipeline = _PIPELINES[card.family](card, base)
        self._pipeline.set_progress_bar_config(disable=True)
        self._size, self._family = size, card.family
        self._prompt = prompt.to(base.denoiser().dtype)

    def answer(self, source: Path, target: Path, setting: Setting) -> None:
        """Read a picture, make the video, and write its last frame."""
        from PIL import Image

        height, width = self._size
        with Image.open(source) as file:
            image = file.convert("RGB")
        result = self._pipeline(
            image=image,
            height=height,
            width=width,
            num_frames=setting.frames,
            num_inference_steps=setting.steps,
            guidance_scale=setting.guidance,
            prompt_embeds=self._prompt,
            negative_prompt_embeds=self._prompt,
            output_type="pil",
            **self._extra(setting),
        )
        result.frames[0][-1].save(target, "PNG")

    def _extra(self, setting: Setting) -> dict[str, Any]:
        """Give what one family alone takes."""
        if self._family == "cogvideox":
            return {"use_dynamic_cfg": setting.guidance > 1}
        if self._family == "ltx":
            mask = self._prompt.new_ones(self._prompt.shape[:2])
            return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        return {}


def _cogvideox(card: Card, base: Any) -> Any:
    from diffusers import CogVideoXImageToVideoPipeline

    return CogVideoXImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=base.autoencoder,
        transformer=base.denoiser().transformer,
        scheduler=_scheduler(card.scheduler),
    )


def _wan(card: Card, base: Any) -> Any:
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor

    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=base.autoencoder,
        transformer=base.denoiser().transformer,
        scheduler=_scheduler(card.scheduler),
        image_processor=CLIPImageProcessor() if base.image_encoder else None,
        image_encoder=base.image_encoder.tower if base.image_encoder else None,
        expand_timesteps=base.is_first_clean,
    )


def _ltx(card: Card, base: Any) -> Any:
    from diffusers import LTXImageToVideoPipeline

    return LTXImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=base.autoencoder,
        transformer=base.denoiser().transformer,
        scheduler=_scheduler(card.scheduler),
    )


_PIPELINES: dict[str, Callable[[Card, Any], Any]] = {
    "cogvideox": _cogvideox,
    "wan": _wan,
    "ltx": _ltx,
}


def _scheduler(config: Mapping[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, config["_class_name"]).from_config(dict(config))
