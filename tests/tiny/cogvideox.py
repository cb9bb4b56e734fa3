"""Tiny CogVideoX pipelines with random weights."""

from pathlib import Path
from typing import Any

import torch

# The first CogVideoX, and 1.5 with its pairs of frames, frame-rate embedding and odd scaling.
VERSIONS: dict[str, dict[str, Any]] = {
    "1.0": {"transformer": {}, "vae": {}},
    "1.5": {
        "transformer": {
            "patch_size_t": 2,
            "ofs_embed_dim": 4,
            "patch_bias": False,
            "use_learned_positional_embeddings": False,
        },
        "vae": {"invert_scale_latents": True},
    },
}


def write(folder: Path, version: str, text: dict[str, Any]) -> Path:
    """Write a pipeline in the layout of the Hub, weights in shards, with a tokenizer of words."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(0)
    transformer = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 8,
        "out_channels": 4,
        "time_embed_dim": 4,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 6,
        "sample_height": 4,
        "sample_frames": 9,
        "patch_size": 2,
        "max_text_seq_length": 8,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": False,
    }
    autoencoder = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "temporal_compression_ratio": 4,
        "scaling_factor": 0.7,
    }
    pipeline = CogVideoXImageToVideoPipeline(
        **text,
        vae=AutoencoderKLCogVideoX(**autoencoder | VERSIONS[version]["vae"]),
        transformer=CogVideoXTransformer3DModel(**transformer | VERSIONS[version]["transformer"]),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=1.0 if version == "1.5" else 3.0,
        ),
    )
    pipeline.save_pretrained(folder, max_shard_size="20KB")
    return folder
