"""Tiny Wan pipelines with random weights."""

from pathlib import Path
from typing import Any

import torch

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
AUTOENCODER: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.5, 1.0, 2.0],
}
# Wan2.1 with its image branch, Wan2.2 with a clean first frame, and Wan2.2 of two experts.
VERSIONS: dict[str, dict[str, Any]] = {
    "2.1": {
        "transformer": {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24},
        "shift": 3.0,
    },
    "2.2-5B": {
        "transformer": {},
        "vae": {
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        },
        "pipeline": {"expand_timesteps": True},
        "shift": 5.0,
    },
    "2.2-A14B": {
        "transformer": {"in_channels": 12},
        "pipeline": {"boundary_ratio": 0.9},
        "shift": 3.0,
    },
}


def write(folder: Path, version: str, text: dict[str, Any]) -> Path:
    """Write a pipeline in the layout of the Hub, weights in shards, with a tokenizer of words."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanTransformer3DModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    kind = VERSIONS[version]
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=32,
        image_size=224,
    )
    has_image = "image_dim" in kind["transformer"]
    sizes = TRANSFORMER | kind["transformer"]
    is_two = "boundary_ratio" in kind.get("pipeline", {})
    pipeline = WanImageToVideoPipeline(
        **text,
        **kind.get("pipeline", {}),
        vae=AutoencoderKLWan(**AUTOENCODER | kind.get("vae", {})),
        transformer=WanTransformer3DModel(**sizes),
        transformer_2=WanTransformer3DModel(**sizes) if is_two else None,
        image_encoder=CLIPVisionModel(tower) if has_image else None,
        image_processor=CLIPImageProcessor() if has_image else None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=kind["shift"],
        ),
    )
    pipeline.save_pretrained(folder, max_shard_size="20KB")
    return folder
